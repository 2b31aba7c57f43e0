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
pub mod url;

pub mod access {
    #[derive(Debug, Clone, Default)]
    pub struct AccessRules;
}

pub mod ledger {
    pub use super::url::OriginUrl;
    use crate::ledger::{Origin, OriginError};
    use crate::model::Seq;

    pub fn open(url: &OriginUrl) -> Result<Box<dyn Origin>, OriginError> {
        Ok(Box::new(Fake(url.clone())))
    }

    struct Fake(OriginUrl);

    impl Origin for Fake {
        fn fetch(&mut self, _: Seq) -> Result<Vec<crate::ledger::Entry>, OriginError> {
            self.last_seq().map(|_| Vec::new())
        }

        fn last_seq(&mut self) -> Result<Option<Seq>, OriginError> {
            match &self.0 {
                OriginUrl::MySql(_) => loop {
                    std::thread::park();
                },
                OriginUrl::Sqlite(path) if path.exists() => Ok(Some(Seq::new(3))),
                _ => Err(OriginError::Unreachable {
                    origin: self.0.to_string(),
                    reason: "no such file or server".into(),
                }),
            }
        }

        fn seqs_between(&mut self, _: Seq, _: Seq) -> Result<Vec<Seq>, OriginError> {
            Ok(Vec::new())
        }

        fn describe(&self) -> String {
            self.0.to_string()
        }
    }
}

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

    pub struct LdbWriter(bool);

    impl LdbWriter {
        pub fn open(path: &Path) -> Result<Self, LdbError> {
            std::fs::OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .map(|f| LdbWriter(f.metadata().unwrap().len() > 0))
                .map_err(|e| LdbError(format!("cannot open the LDB {}: {e}", path.display())))
        }

        pub fn seq(&self) -> Seq {
            Seq::new(u64::from(self.0))
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
        pub fn stop(&self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    pub struct Settings {
        pub poll_interval: Duration,
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

        pub fn run(mut self, stop: &StopHandle) {
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
