"""The system calls of a task's machine, as a seccomp filter for bubblewrap.

The machine has one user, who is called root there. Calls that change an owner or a user return success and change
nothing, so that `useradd`, `chown` and `su` of root run without privileges on the host, as in Charliecloud's builds.
Calls that a task never needs, and that reach deep into the kernel or into other processes, are refused.
Hazard: a file keeps the owner root, and a program that became another user may still read everything.
"""

from __future__ import annotations

import errno
import platform
import struct

from runtime.errors import ToolRefused

# (AUDIT_ARCH, calls without effect, refused calls), by the kernel's name of the processor.
_CALLS = {
    "x86_64": (
        0xC000003E,
        # chown fchown lchown fchownat setuid setgid setreuid setregid setgroups setresuid setresgid setfsuid setfsgid
        (92, 93, 94, 260, 105, 106, 113, 114, 116, 117, 119, 122, 123),
        # ptrace process_vm_readv process_vm_writev mount umount2 pivot_root unshare setns keyctl add_key request_key
        # bpf perf_event_open userfaultfd io_uring_{setup,enter,register} open_by_handle_at
        (101, 310, 311, 165, 166, 155, 272, 308, 250, 248, 249, 321, 298, 323, 425, 426, 427, 304),
    ),
    "aarch64": (
        0xC00000B7,
        # fchownat fchown setregid setgid setreuid setuid setresuid setresgid setfsuid setfsgid setgroups
        (54, 55, 143, 144, 145, 146, 147, 149, 151, 152, 159),
        # the same as above
        (117, 270, 271, 40, 39, 41, 97, 268, 219, 217, 218, 280, 241, 282, 425, 426, 427, 265),
    ),
}
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06
_ARCH_OFFSET, _NUMBER_OFFSET = 4, 0
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_X32 = 0x40000000
"""Numbers from here on are another set of calls of x86_64."""


def make_filter() -> bytes:
    """Return the program, an array of `struct sock_filter`.

    Raises:
        ToolRefused: the numbers of this processor's calls are unknown.
    """
    processor = platform.machine()
    if processor not in _CALLS:
        raise ToolRefused(f"a task's machine runs on {' and '.join(_CALLS)}, and this processor is {processor!r}")
    arch, without_effect, refused = _CALLS[processor]
    program = [
        _instruction(_LOAD, value=_ARCH_OFFSET),
        _instruction(_JUMP_EQUAL, if_true=1, value=arch),
        _instruction(_RETURN, value=_ERRNO | errno.ENOSYS),
        _instruction(_LOAD, value=_NUMBER_OFFSET),
        _instruction(_JUMP_GREATER_EQUAL, if_false=1, value=_X32),
        _instruction(_RETURN, value=_ERRNO | errno.ENOSYS),
    ]
    for number, error in [*((it, 0) for it in without_effect), *((it, errno.EPERM) for it in refused)]:
        program += [
            _instruction(_JUMP_EQUAL, if_false=1, value=number),
            _instruction(_RETURN, value=_ERRNO | error),
        ]
    return b"".join([*program, _instruction(_RETURN, value=_ALLOW)])


def _instruction(code: int, *, if_true: int = 0, if_false: int = 0, value: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
