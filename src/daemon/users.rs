//! User and group names, looked up in the system's databases.

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::ptr;

/// The number of the user `name`. `None` when there is no such user.
pub(crate) fn uid(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    with_buffer(|buffer| {
        let mut entry = MaybeUninit::<libc::passwd>::uninit();
        let mut found = ptr::null_mut();
        // SAFETY: the pointers are valid for the call and `buffer` has the length that is given.
        let error = unsafe {
            libc::getpwnam_r(
                name.as_ptr(),
                entry.as_mut_ptr(),
                buffer.as_mut_ptr(),
                buffer.len(),
                &raw mut found,
            )
        };
        // SAFETY: `found` is null or points to `entry`, which is then filled.
        (error, unsafe { found.as_ref() }.map(|entry| entry.pw_uid))
    })
}

/// The number of the group `name`. `None` when there is no such group.
pub(crate) fn gid(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    with_buffer(|buffer| {
        let mut entry = MaybeUninit::<libc::group>::uninit();
        let mut found = ptr::null_mut();
        // SAFETY: the pointers are valid for the call and `buffer` has the length that is given.
        let error = unsafe {
            libc::getgrnam_r(
                name.as_ptr(),
                entry.as_mut_ptr(),
                buffer.as_mut_ptr(),
                buffer.len(),
                &raw mut found,
            )
        };
        // SAFETY: `found` is null or points to `entry`, which is then filled.
        (error, unsafe { found.as_ref() }.map(|entry| entry.gr_gid))
    })
}

/// Large groups need large buffers, and the size is not known beforehand.
fn with_buffer(
    mut look_up: impl FnMut(&mut [libc::c_char]) -> (libc::c_int, Option<u32>),
) -> Option<u32> {
    let mut size = 1 << 10;
    loop {
        let (error, found) = look_up(&mut vec![0; size]);
        if error != libc::ERANGE || size >= 1 << 24 {
            return found;
        }
        size *= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_looked_up() {
        assert_eq!(uid("root"), Some(0));
        assert_eq!(gid("root"), Some(0));
        assert_eq!(gid("no-such-group"), None);
        // Numbers are the business of the access rules, which know those that mean nobody.
        assert_eq!(uid("4294967295"), None);
        assert_eq!(gid("+5"), None);
        assert_eq!(uid("no\0user"), None);
    }
}
