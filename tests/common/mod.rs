//! What several test binaries need.

#![allow(dead_code, unreachable_pub)]

pub mod central;
pub mod mariadb;
pub mod proxy;
