//! Tells the program which machine it was built for.

fn main() {
    println!(
        "cargo::rustc-env=XTASK_TARGET={}",
        std::env::var("TARGET").expect("cargo says for which machine it builds")
    );
}
