//! The one capability that the redirect needs, taken up from where an image can leave it.
//!
//! A container that runs as a user other than root gets an added capability into its bounding set only. The image's file
//! carries `cap_net_admin` as *permitted*; not as effective, for then a container without it (the proxy) could not start
//! the same file at all. So the init container finds it permitted and makes it effective here. Source: capabilities(7).
#![allow(unsafe_code, reason = "std and libc have no wrapper for capget and capset")]

use std::io;

const VERSION_3: u32 = 0x2008_0522;
const NET_ADMIN: u32 = 1 << 12;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// The low 32 capabilities, then the high 32.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Makes NET_ADMIN effective if this process may. Where it may not, the kernel's refusal of what follows says so.
pub(super) fn take_up_net_admin() -> io::Result<()> {
    let mut header = Header { version: VERSION_3, pid: 0 };
    let mut data = [Data::default(); 2];
    // SAFETY: capget writes at most two `Data` for version 3, which `data` has room for; both pointers outlive the call.
    if unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if data[0].permitted & NET_ADMIN == 0 || data[0].effective & NET_ADMIN != 0 {
        return Ok(());
    }
    data[0].effective |= NET_ADMIN;
    // SAFETY: as above; capset only reads `data`.
    if unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
