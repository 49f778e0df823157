//! The resources of `tidegate.dev/v1alpha1`, the annotations of namespaces, and the reader of manifests.
//!
//! Everything that people write comes in here and leaves as `tidegate_policy::model`,
//! or as a [`Problem`] that names file, document, line and field. Nothing is coerced
//! and nothing unknown is skipped: what cannot be read must not look as if it held.
#![forbid(unsafe_code)]

pub mod annotation;
mod closed;
pub mod convert;
mod core_v1;
pub mod crd;
mod de;
mod format;
pub mod index;
mod lint;
mod manifest;
mod problem;
mod reader;
pub mod resource;
pub mod rule;
mod schema;
mod tree;

pub use lint::not_tls;
pub use problem::{Code, FieldPath, FieldProblem, ObjectRef, Problem, Seg, Severity, printable};
pub use reader::{
    Loaded, MAX_DEPTH, MAX_DOCUMENTS, MAX_FILE, MAX_FILES, Reader, check, check_file, check_input, watch_paths,
};
