//! What the gateway asks of an API server, and tells it: the one package that speaks to Kubernetes.
#![forbid(unsafe_code)]
