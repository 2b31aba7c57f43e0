//! A mount with nothing in it but `.ctlfs/status.json`, `seq` and a file that can be held open.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner,
    MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, Request, Session, SessionACL,
    SessionUnmounter,
};

use super::access::AccessRules;
use crate::model::{ChangeSet, Seq};
use crate::reflector::CommitObserver;
use crate::status::StatusBoard;

pub struct Settings {
    pub mountpoint: PathBuf,
    pub ldb: PathBuf,
    pub source: Source,
    pub state_dir: Option<PathBuf>,
    pub access: AccessRules,
    pub newline: bool,
    pub allow_other: bool,
    pub threads: usize,
    pub plain_open: bool,
}

pub enum Source {
    Owned,
    Foreign { check_interval: Duration },
}

#[derive(Default)]
pub struct MountCounters {
    pub requests: BTreeMap<&'static str, u64>,
    pub requests_total: u64,
    pub nodes: u64,
    pub kept_bytes: u64,
    pub spilled_bytes: u64,
    pub seq: Seq,
    pub fallbacks: Vec<String>,
    pub families: u64,
    pub tables: u64,
}

pub type StatusSource = Box<dyn Fn(&MountCounters) -> Vec<u8> + Send + Sync>;

pub type MountError = std::io::Error;

pub struct Mounted {
    thread: Option<JoinHandle<std::io::Result<()>>>,
    unmounter: Unmounter,
}

#[derive(Clone)]
pub struct Unmounter(Arc<Mutex<SessionUnmounter>>, PathBuf);

impl Unmounter {
    pub fn unmount(&self) {
        let path = std::ffi::CString::new(self.1.to_str().unwrap()).unwrap();
        // SAFETY: a stub.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        let _ = self.0.lock().unwrap().unmount();
    }
}

pub fn mount(
    settings: Settings,
    info: StatusSource,
    _: Arc<StatusBoard>,
) -> Result<Mounted, MountError> {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("ctlfs".into()),
        MountOption::Subtype("ctlfs".into()),
        MountOption::DefaultPermissions,
        MountOption::RO,
    ];
    if settings.allow_other {
        config.acl = SessionACL::All;
    }
    let fs = Fs(info, Mutex::default());
    let mut session = Session::new(fs, &settings.mountpoint, &config)?;
    let unmounter = Unmounter(
        Arc::new(Mutex::new(session.unmount_callable())),
        settings.mountpoint.clone(),
    );
    Ok(Mounted {
        thread: Some(std::thread::spawn(move || session.run())),
        unmounter,
    })
}

impl Mounted {
    pub fn observer(&self) -> Box<dyn CommitObserver> {
        Box::new(Nobody)
    }

    pub fn unmounter(&self) -> Unmounter {
        self.unmounter.clone()
    }

    pub fn wait(mut self) -> Result<(), MountError> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.unmounter.unmount();
    }
}

struct Nobody;

impl CommitObserver for Nobody {
    fn before_commit(&mut self, _: &ChangeSet) {}
    fn after_commit(&mut self, _: &ChangeSet) {}
    fn commit_failed(&mut self, _: &ChangeSet) {}
}

struct Fs(StatusSource, Mutex<Vec<u8>>);

fn attr(ino: u64, size: u64) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size,
        blocks: 1,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if ino < 3 {
            FileType::Directory
        } else {
            FileType::RegularFile
        },
        perm: if ino < 3 { 0o555 } else { 0o444 },
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        flags: 0,
        blksize: 512,
    }
}

impl Filesystem for Fs {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match (u64::from(parent), name.to_str()) {
            (1, Some(".ctlfs")) => reply.entry(&Duration::ZERO, &attr(2, 0), Generation(0)),
            (2, Some("status.json")) => {
                let bytes = (self.0)(&MountCounters::default());
                let size = bytes.len() as u64;
                *self.1.lock().unwrap() = bytes;
                reply.entry(&Duration::ZERO, &attr(3, size), Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let size = self.1.lock().unwrap().len() as u64;
        reply.attr(&Duration::ZERO, &attr(ino.into(), size));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        _: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let bytes = self.1.lock().unwrap();
        let from = usize::try_from(offset).unwrap().min(bytes.len());
        reply.data(&bytes[from..]);
    }
}
