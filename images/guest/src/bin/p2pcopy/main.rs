//! Copies between block devices through a chosen buffer.
fn main() {}
