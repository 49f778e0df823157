# Everything runs on one Debian 12 machine, as root, with Rust and a kernel of 6.6 or newer.
# Missing packages are installed by scripts/setup.
export PATH := $(PATH):$(if $(CARGO_HOME),$(CARGO_HOME),$(HOME)/.cargo)/bin

# Always the same packages: of others cargo would choose other features, and build what they share once more.
WORKSPACE := --locked --workspace --exclude tidegate-ebpf-programs

.PHONY: help demo demo-kubernetes test test-cluster test-cluster-variants soak lint bench build image setup clean-lab

help:
	@echo "make demo       builds everything, brings up the lab and plays the story"
	@echo "make demo-kubernetes  the same with a real API server, changed with kubectl"
	@echo "make test       runs every test, the lab's included"
	@echo "make test-cluster  the chart in a cluster with kubelets, on this machine"
	@echo "make test-cluster-variants  the same in clusters that are set up in other ways"
	@echo "make soak       lets a week of simulated time pass, then the lab's processes work for 20 minutes; over an hour"
	@echo "make image      makes target/tidegate-image.tar, which container engines load"
	@echo "make lint       checks formatting and lints"
	@echo "make bench      measures Tidegate beside unbound, dnsdist, HAProxy and nginx"
	@echo "make clean-lab  removes what a crashed lab left behind"

setup:
	@scripts/setup

build: setup
	cargo build $(WORKSPACE) --bins

# What the Containerfile gives, without a container engine.
image: setup
	scripts/image program target/tidegate-image
	scripts/image archive target/tidegate-image target/tidegate-image.tar

demo: build
	target/debug/tidegate-lab demo

demo-kubernetes: build
	target/debug/tidegate-lab demo --kubernetes

test: setup
	@scripts/test

# Kubelets, containerd and CoreDNS are built or installed on first use, and cached. Two of the variants are part of test-cluster.
test-cluster: clusters
	@scripts/test-cluster

test-cluster-variants: clusters
	cargo test $(WORKSPACE) --test cluster -- --test-threads=1 --nocapture --include-ignored variants::

.PHONY: clusters
clusters:
	@scripts/setup cluster
	@scripts/kube-tools kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy etcd kubectl helm coredns ptp bridge loopback host-local >/dev/null
	cargo build $(WORKSPACE) --bins

# What lasts too long for `make test`: both compare what is held after a while with what is held at the end.
# TIDEGATE_SOAK_MINUTES says how long the second one works.
soak: setup
	cargo test --locked --release -p tidegate -- --ignored --exact --nocapture core::soak::a_week
	cargo build $(WORKSPACE) --bins
	cargo test $(WORKSPACE) --test soak -- --nocapture

# Tests by name, too: what `test = false` leaves to scripts/test is no part of --all-targets.
lint: setup
	cargo fmt --check
	cargo clippy $(WORKSPACE) --all-targets -- -D warnings
	cargo clippy $(WORKSPACE) --test '*' -- -D warnings

# Takes two CPUs that have nothing else to do. docs/performance.md says what is measured. Criterion's run builds the program, too.
bench:
	@scripts/setup bench
	cargo bench --locked -p tidegate-policy --bench matcher -p tidegate-bench --bench compile -- --warm-up-time 0.3 --measurement-time 0.7 --sample-size 10 --noplot
	target/release/tidegate-bench --criterion target/criterion --markdown target/bench.md

clean-lab: build
	target/debug/tidegate-lab down --all
