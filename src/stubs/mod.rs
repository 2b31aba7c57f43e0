//! Stand-ins for what other branches bring, so that this one compiles and can be tried. The merge
//! drops this directory, its line in lib.rs, and changes the imports at the head of
//! `daemon/wiring.rs`.
#![allow(
    missing_docs,
    dead_code,
    unreachable_pub,
    clippy::undocumented_unsafe_blocks,
    clippy::panic,
    clippy::expect_used,
    clippy::unwrap_used
)]

pub mod mount;

pub mod ldb {
    use std::fmt;
    use std::path::Path;

    use crate::model::Seq;

    #[derive(Debug)]
    pub struct LdbError(String);

    impl fmt::Display for LdbError {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(&self.0)
        }
    }

    pub struct Position {
        pub seq: Seq,
    }

    pub struct LdbWriter(bool, Position);

    impl LdbWriter {
        pub fn open(path: &Path) -> Result<Self, LdbError> {
            std::fs::OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .map(|f| LdbWriter(f.metadata().unwrap().len() > 0, Position { seq: Seq::ZERO }))
                .map_err(|e| LdbError(format!("cannot open the LDB {}: {e}", path.display())))
        }

        pub fn position(&self) -> &Position {
            &self.1
        }

        pub fn is_ready(&self) -> bool {
            self.0
        }
    }
}

pub mod reflector {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, SystemTime};

    use super::ldb::LdbWriter;
    use crate::ledger::Origin;
    use crate::model::Seq;
    use crate::reflector::CommitObserver;
    use crate::status::{Problem, ProblemKind, StatusBoard};

    #[derive(Clone, Default)]
    pub struct StopHandle(Arc<AtomicBool>);

    impl StopHandle {
        pub fn new() -> Self {
            Self::default()
        }

        pub fn stop(&self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[derive(Default)]
    pub struct Settings {
        pub poll_interval: Duration,
        pub batch_entries: usize,
    }

    pub struct Reflector(Box<dyn Origin>, Arc<StatusBoard>, Settings);

    impl Reflector {
        pub fn new(
            origin: Box<dyn Origin>,
            _: LdbWriter,
            _: Box<dyn CommitObserver>,
            board: Arc<StatusBoard>,
            settings: Settings,
        ) -> Self {
            Reflector(origin, board, settings)
        }

        pub fn run(&mut self, stop: &StopHandle) {
            let mut at = 0;
            while !stop.0.load(Ordering::Relaxed) {
                let last = self.0.last_seq();
                self.1.update(|p| match last {
                    Ok(last) => {
                        let last = last.unwrap_or_default();
                        at = (at + 1).min(last.get());
                        p.origin_last = Some(last);
                        p.last_contact = Some(SystemTime::now());
                        p.applied = Seq::new(at);
                        p.applied_time = Some(SystemTime::now().into());
                        if at == last.get() {
                            p.ready = true;
                            p.caught_up = p.last_contact;
                        }
                        p.problem = None;
                    }
                    Err(error) => {
                        p.problem.get_or_insert_with(|| Problem {
                            kind: ProblemKind::Origin,
                            seq: None,
                            statement: None,
                            reason: error.to_string(),
                            since: SystemTime::now(),
                        });
                    }
                });
                std::thread::sleep(self.2.poll_interval.min(Duration::from_millis(100)));
            }
        }
    }
}
