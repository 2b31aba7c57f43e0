//! The daemon's place on a busy processor: it asks for no more of it than others get, but for short
//! turns, and so for a turn soon.

use std::mem;

/// How long its threads want to run at a time: what an answer takes, about.
const SLICE_NANOS: u64 = 100_000;

/// Asks for short turns for the calling thread and all that it starts from then on. Linux from 6.12
/// lets a thread that wants to run briefly go before others that run all the time, at the same
/// share in the end; older ones take no notice. Not having it is no error.
pub(super) fn shorten() {
    // SAFETY: zeros are a valid `sched_attr`, whose fields are all numbers; both calls get its size
    // and a pointer to it that is valid for that long.
    unsafe {
        let mut attributes: libc::sched_attr = mem::zeroed();
        let size = libc::c_uint::try_from(mem::size_of_val(&attributes)).unwrap_or(0);
        let own = 0;
        let got = libc::syscall(libc::SYS_sched_getattr, own, &raw mut attributes, size, 0);
        let ordinary = u32::try_from(libc::SCHED_OTHER).is_ok_and(|p| attributes.sched_policy == p);
        // Whoever runs it under another policy has their reasons.
        if got == 0 && ordinary {
            attributes.sched_runtime = SLICE_NANOS;
            libc::syscall(libc::SYS_sched_setattr, own, &raw mut attributes, 0);
        }
    }
}
