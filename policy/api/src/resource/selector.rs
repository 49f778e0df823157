//! Label selectors.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::convert::{MAX_SELECTOR, MAX_SELECTOR_VALUES};
use crate::schema;

/// A label selector. Empty ({}) selects everything; what it lists must hold altogether.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-map-type" = "atomic"))]
pub struct LabelSelector {
    /// Labels that must be there with exactly these values. At most 64.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, schema::LabelValue>", extend("maxProperties" = MAX_SELECTOR))]
    pub match_labels: BTreeMap<String, String>,
    /// Expressions that must hold. At most 64.
    #[serde(default)]
    #[schemars(length(max = MAX_SELECTOR), extend("x-kubernetes-list-type" = "atomic"))]
    pub match_expressions: Vec<LabelExpression>,
}

/// An expression over one label.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[schema::Cel {
    rule: "(self.operator == 'In' || self.operator == 'NotIn') == (has(self.values) && size(self.values) > 0)",
    message: "`In` and `NotIn` need at least one value; `Exists` and `DoesNotExist` take none",
    path: ".values",
}])))]
pub struct LabelExpression {
    /// The label's key, [prefix/]name.
    #[schemars(with = "schema::LabelKey")]
    pub key: String,
    /// How the label is compared.
    pub operator: LabelOperator,
    /// The values: 1 to 64 for In and NotIn, none for Exists and DoesNotExist.
    #[serde(default)]
    #[schemars(
        with = "Vec<schema::LabelValue>",
        length(max = MAX_SELECTOR_VALUES),
        extend("x-kubernetes-list-type" = "atomic")
    )]
    pub values: Vec<String>,
}

/// The operator of a label expression.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum LabelOperator {
    /// The value is one of these.
    In,
    /// The value is none of these, or the label is absent.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is absent.
    DoesNotExist,
}
