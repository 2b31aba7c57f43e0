//! The reference model: what a sequence of ledger entries makes of the tree, written down a second
//! time in the plainest way, and compared with the mount after each step.
//!
//! The model knows nothing of the crate's own rendering, naming or schemas. Names and values come
//! from small sets, so that they meet again and again; descriptors and directories stay open and
//! every path ever seen is asked for after each step, so that what the kernel holds is put to the
//! test as well. A failure shrinks to a short list of steps: give it a name below.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::undocumented_unsafe_blocks,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    unreachable_pub
)]

mod common {
    pub mod daemon;
    pub mod model;
}

use std::cell::RefCell;

use common::model::world::World;
use common::model::{Op, Row};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

fn row() -> impl Strategy<Value = Row> {
    (0_u8..4, any::<[u8; 3]>(), any::<[u8; 5]>()).prop_map(|(kind, key, values)| Row {
        kind,
        key,
        values,
    })
}

fn op() -> impl Strategy<Value = Op> {
    let table = 0_u8..4;
    let rows = || proptest::collection::vec(row(), 0..6);
    prop_oneof![
        3 => (table.clone(), any::<u8>(), rows()).prop_map(|(t, s, r)| Op::Create(t, s, r)),
        12 => (table.clone(), table.clone(), proptest::collection::vec(row(), 1..8))
            .prop_map(|(a, b, r)| Op::Mutate(a, b, r)),
        2 => (table.clone(), any::<u8>()).prop_map(|(t, ty)| Op::AddField(t, ty)),
        1 => table.clone().prop_map(Op::Drop),
        1 => table.clone().prop_map(Op::Clear),
        1 => (table.clone(), any::<u8>(), rows(), any::<bool>())
            .prop_map(|(t, s, r, whole)| Op::Recreate(t, s, r, whole)),
        1 => (table.clone(), any::<u8>()).prop_map(|(t, f)| Op::Nullify(t, f)),
        3 => any::<[u8; 4]>().prop_map(Op::Hold),
        1 => Just(Op::Release),
    ]
}

/// Plays the steps on an empty ledger of their own.
fn play(steps: &[Op]) {
    let mut world = World::new();
    world.play(steps);
}

#[test]
fn the_tree_is_what_the_ledger_says() {
    let world = RefCell::new(World::new());
    let mut runner = TestRunner::new(ProptestConfig {
        cases: ProptestConfig::default().cases.min(48),
        max_shrink_iters: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let result = runner.run(&proptest::collection::vec(op(), 1..24), |steps| {
        world.borrow_mut().play(&steps);
        Ok(())
    });
    println!("{}", world.borrow().summary());
    if let Err(error) = result {
        panic!("{error}");
    }
}

// Found by the test above.

fn row_of(key: u8, value: u8) -> Row {
    Row {
        kind: 0,
        key: [key; 3],
        values: [value; 5],
    }
}

#[test]
fn a_row_stays_in_its_open_directory_when_the_table_gets_a_field() {
    // The fifth place of the tree is the row's directory.
    play(&[
        Op::Create(0, 0, vec![row_of(0, 1)]),
        Op::Hold([4; 4]),
        Op::AddField(0, 0),
        Op::Mutate(0, 0, vec![row_of(0, 2)]),
    ]);
}

#[test]
fn a_row_that_comes_back_is_not_remembered_as_absent() {
    for gone in [
        Op::Clear(0),
        Op::Recreate(0, 0, vec![], true),
        Op::Recreate(0, 0, vec![], false),
    ] {
        play(&[
            Op::Create(0, 0, vec![row_of(0, 1)]),
            Op::Hold([4; 4]),
            gone,
            Op::Mutate(0, 0, vec![row_of(0, 2)]),
        ]);
    }
}
