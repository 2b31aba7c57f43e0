//! The FUSE side of the mount: translates requests and replies, counts them, and lets no panic out.
//! What to answer is [`Server`]'s.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};

use super::counters::{Operation, Requests};
use super::export::Renderer;
use super::server::{Attributes, Fault, Lookup, Server};
use crate::ldb::LdbError;

/// What a listing reports for an inode that the kernel has not looked up: a number that no file
/// has, as libfuse does.
const UNKNOWN_INODE: u64 = 0xffff_ffff;
/// Inode numbers are never reused within a mount, so generations say nothing.
const GENERATION: Generation = Generation(0);

/// The filesystem as fuser runs it.
pub(super) struct Fs {
    server: Arc<Server>,
    requests: Arc<Requests>,
    renderer: Renderer,
    /// Whether OPEN is answered with ENOSYS, after which the kernel opens files by itself.
    skip_open: bool,
}

impl Fs {
    /// `skip_open` asks for the fast path; it is given up where the kernel lacks it.
    pub(super) fn new(
        server: Arc<Server>,
        requests: Arc<Requests>,
        renderer: Renderer,
        skip_open: bool,
    ) -> Self {
        Fs {
            server,
            requests,
            renderer,
            skip_open,
        }
    }

    /// Counts a request and answers it. Should answering panic, the reply that is dropped on the
    /// way out answers EIO: the reader gets an error, and the next request is served.
    fn answer(&self, operation: Operation, ino: INodeNo, answer: impl FnOnce(&Server)) {
        let control = operation != Operation::Forget && self.server.is_control(ino.0);
        let operation = if control {
            Operation::Control
        } else {
            operation
        };
        self.requests.count(operation);
        if catch_unwind(AssertUnwindSafe(|| answer(&self.server))).is_err() {
            tracing::error!(
                operation = operation.name(),
                "a request failed in a way that is a defect of ctlfs"
            );
        }
    }

    /// The same for a request that may have to wait until the file it is about is made.
    fn answer_rendered(
        &self,
        operation: Operation,
        ino: INodeNo,
        answer: impl FnOnce(&Server) + Send + 'static,
    ) {
        if self.server.awaits_rendering(ino.0) {
            self.requests.count(operation);
            self.renderer.submit(ino.0, Box::new(answer));
        } else {
            self.answer(operation, ino, answer);
        }
    }
}

/// The errno of a fault; logs the ones that a person has to know of.
fn errno(fault: &Fault) -> Errno {
    match fault {
        Fault::NotFound => Errno::ENOENT,
        Fault::Stale => Errno::ESTALE,
        Fault::NoAttribute => Errno::NO_XATTR,
        Fault::NotADirectory => Errno::ENOTDIR,
        Fault::TooLarge => Errno::EFBIG,
        Fault::ReadOnly => Errno::EROFS,
        Fault::Exists => Errno::EEXIST,
        Fault::BadName => Errno::EINVAL,
        Fault::NameTooLong => Errno::ENAMETOOLONG,
        Fault::TooManyPins => Errno::ENOSPC,
        Fault::CannotPin => Errno::EOPNOTSUPP,
        // Logged where it was found; a reader that tries again must not fill the log.
        Fault::Unrendered => Errno::EIO,
        Fault::Ldb(LdbError::Corrupt { .. } | LdbError::NotAnLdb { .. }) => Errno::EIO,
        Fault::Ldb(_) | Fault::Kept(_) | Fault::Restless => {
            tracing::error!(%fault, "cannot answer a reader");
            Errno::EIO
        }
    }
}

fn file_attr(attributes: &Attributes) -> FileAttr {
    let time = SystemTime::from(attributes.time);
    FileAttr {
        ino: INodeNo(attributes.ino),
        size: attributes.size,
        blocks: attributes.size.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: if attributes.is_dir {
            FileType::Directory
        } else {
            FileType::RegularFile
        },
        perm: attributes.mode,
        nlink: attributes.links,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// The reply that says a name is absent and may be remembered so: inode zero.
fn absent() -> FileAttr {
    file_attr(&Attributes {
        ino: 0,
        is_dir: false,
        size: 0,
        time: crate::model::LedgerTime::default(),
        mode: 0,
        uid: 0,
        gid: 0,
        links: 0,
    })
}

fn reply_entry(reply: ReplyEntry, entry: Result<Lookup, Fault>) {
    match entry {
        Ok(Lookup::Found {
            attributes,
            entry_ttl,
            attr_ttl,
        }) => {
            let attr = file_attr(&attributes);
            reply.entry_with_ttls(&attr_ttl, &entry_ttl, &attr, GENERATION);
        }
        Ok(Lookup::Absent(ttl)) if ttl.is_zero() => reply.error(Errno::ENOENT),
        Ok(Lookup::Absent(ttl)) => reply.entry(&ttl, &absent(), GENERATION),
        Err(fault) => reply.error(errno(&fault)),
    }
}

/// Answers the announcing thread.
fn reply_removal(reply: ReplyEmpty, server: &Server, parent: INodeNo, name: &OsStr) {
    if server.announces_removal(parent.0, name.as_bytes()) {
        reply.ok();
    } else {
        reply.error(Errno::ENOENT);
    }
}

fn reply_xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>, Fault>) {
    match value {
        Err(fault) => reply.error(errno(&fault)),
        Ok(value) => match u32::try_from(value.len()) {
            Ok(length) if size == 0 => reply.size(length),
            Ok(length) if length <= size => reply.data(&value),
            _ => reply.error(Errno::ERANGE),
        },
    }
}

impl Filesystem for Fs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        if config
            .add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS)
            .is_err()
        {
            self.requests
                .fall_back("the kernel looks names up one at a time (no FUSE_PARALLEL_DIROPS)");
        }
        if self.skip_open
            && !config
                .capabilities()
                .contains(InitFlags::FUSE_NO_OPEN_SUPPORT)
        {
            self.skip_open = false;
            self.requests.fall_back(
                "every open asks the daemon, so reads are slower (no FUSE_NO_OPEN_SUPPORT)",
            );
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.answer(Operation::Lookup, parent, |server| {
            let name = name.as_bytes();
            reply_entry(
                reply,
                if server.is_announcer(request.pid()) {
                    server.lookup_announcing(parent.0, name)
                } else {
                    server.lookup(parent.0, name)
                },
            );
        });
    }

    fn forget(&self, _: &Request, ino: INodeNo, count: u64) {
        self.answer(Operation::Forget, ino, |server| server.forget(ino.0, count));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.answer_rendered(Operation::Getattr, ino, move |server| {
            match server.getattr(ino.0) {
                Ok((attributes, ttl)) => reply.attr(&ttl, &file_attr(&attributes)),
                Err(fault) => reply.error(errno(&fault)),
            }
        });
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.answer(Operation::Open, ino, |_| {
            if self.skip_open {
                // The kernel takes this as "no need to ask", for all files from now on, and keeps
                // cached pages over opens. Each version being an inode of its own, they are right.
                reply.error(Errno::ENOSYS);
            } else {
                reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
            }
        });
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.answer_rendered(Operation::Read, ino, move |server| {
            match server.read_file(ino.0, offset, size) {
                Ok(bytes) => reply.data(&bytes),
                Err(fault) => reply.error(errno(&fault)),
            }
        });
    }

    fn flush(&self, _: &Request, ino: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // The kernel does not ask again.
        self.answer(Operation::Other, ino, |_| reply.error(Errno::ENOSYS));
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.answer(Operation::Opendir, ino, |server| {
            match server.open_directory(ino.0) {
                Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
                Err(fault) => reply.error(errno(&fault)),
            }
        });
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.answer(Operation::Readdir, ino, |server| {
            let mut add = |position, ino: Option<u64>, is_dir, name: &[u8]| {
                let kind = if is_dir {
                    FileType::Directory
                } else {
                    FileType::RegularFile
                };
                let ino = INodeNo(ino.unwrap_or(UNKNOWN_INODE));
                !reply.add(ino, position, kind, OsStr::from_bytes(name))
            };
            match server.list(handle.0, offset, &mut add) {
                Ok(()) => reply.ok(),
                Err(fault) => reply.error(errno(&fault)),
            }
        });
    }

    fn releasedir(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.answer(Operation::Other, ino, |server| {
            server.close_directory(handle.0);
            reply.ok();
        });
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.answer(Operation::Other, ino, |_| reply.ok());
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.answer(Operation::Other, ino, |_| reply.ok());
    }

    fn statfs(&self, _: &Request, ino: INodeNo, reply: ReplyStatfs) {
        // Nothing is ever full: a count of files with none free would be taken for that.
        self.answer(Operation::Other, ino, |_| {
            reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
        });
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.answer(Operation::Xattr, ino, |server| {
            reply_xattr(reply, size, server.xattr(ino.0, name.as_bytes()));
        });
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.answer(Operation::Xattr, ino, |server| {
            reply_xattr(reply, size, server.xattrs(ino.0))
        });
    }

    fn ioctl(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        // Python before 3.14 asks every file whether it is a terminal.
        self.answer(Operation::Other, ino, |_| reply.error(Errno::ENOTTY));
    }

    fn lseek(&self, _: &Request, ino: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        // There are no holes; the kernel finds the end by itself and does not ask again.
        self.answer(Operation::Other, ino, |_| reply.error(Errno::ENOSYS));
    }

    // What follows would change the tree. The mount itself is writable, so that the daemon can
    // announce changes through it: there is nothing to be done then, for the tree has changed
    // already. Everybody else can make pins, and is refused the rest.

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        let owner = (request.uid(), request.gid());
        self.answer(Operation::Other, parent, |server| {
            let name = name.as_bytes();
            reply_entry(
                reply,
                if server.is_announcer(request.pid()) {
                    server.make_announced(parent.0, name)
                } else {
                    server.make_pin(parent.0, name, owner)
                },
            );
        });
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.answer(Operation::Other, parent, |server| {
            if server.is_announcer(request.pid()) {
                return reply_removal(reply, server, parent, name);
            }
            match server.remove_pin(parent.0, name.as_bytes()) {
                Ok(()) => reply.ok(),
                Err(fault) => reply.error(errno(&fault)),
            }
        });
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.answer(Operation::Other, parent, |server| {
            if server.is_announcer(request.pid()) {
                reply_removal(reply, server, parent, name);
            } else {
                reply.error(Errno::EROFS);
            }
        });
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.answer(Operation::Other, parent, |server| {
            if server.is_announcer(request.pid()) {
                reply.ok();
            } else {
                reply.error(Errno::EROFS);
            }
        });
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.answer(Operation::Other, ino, |_| reply.error(Errno::EROFS));
    }

    fn mknod(
        &self,
        _: &Request,
        parent: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        self.answer(Operation::Other, parent, |_| reply.error(Errno::EROFS));
    }

    fn symlink(&self, _: &Request, parent: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        self.answer(Operation::Other, parent, |_| reply.error(Errno::EROFS));
    }

    fn link(&self, _: &Request, ino: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        self.answer(Operation::Other, ino, |_| reply.error(Errno::EROFS));
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        self.answer(Operation::Other, parent, |_| reply.error(Errno::EROFS));
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        _: u64,
        _: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.answer(Operation::Other, ino, |_| reply.error(Errno::EROFS));
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: i32,
        reply: ReplyEmpty,
    ) {
        self.answer(Operation::Other, ino, |_| reply.error(Errno::EROFS));
    }

    fn copy_file_range(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        self.answer(Operation::Other, ino, |_| reply.error(Errno::EROFS));
    }

    fn setxattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: &OsStr,
        _: &[u8],
        _: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        self.answer(Operation::Other, ino, |_| reply.error(Errno::EROFS));
    }

    fn removexattr(&self, _: &Request, ino: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        self.answer(Operation::Other, ino, |_| reply.error(Errno::EROFS));
    }
}
