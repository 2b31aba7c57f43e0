//! The `ctlfs` program.
fn main() {}
