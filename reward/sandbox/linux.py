"""Calls of the Linux kernel that Python has no function for: namespaces, mounts, and a root
directory of the sandbox's own. Standard library only: the sandbox loads this file inside the box.
"""

import ctypes
import os
import struct
import sys

# constants of the kernel's headers
CLONE_NEWNS = 0x20000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
SYS_MOUNT_SETATTR = 442  # the same number on every architecture
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine, -1)
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}.get(os.uname().machine, -1)
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE = 1, 38, 36, 4

_BOX_FILES = 4096  # files and directories in a box: empty ones take memory too

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """Call a libc function that returns -1 on failure. Raises OSError with its name."""
    if getattr(libc, name)(*arguments) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _bytes(value: str | None) -> bytes | None:
    return None if value is None else os.fsencode(value)


def mount(
    source: str | None,
    target: str,
    kind: str | None = None,
    flags: int = 0,
    data: str | None = None,
) -> None:
    call("mount", _bytes(source), _bytes(target), _bytes(kind), ctypes.c_ulong(flags), _bytes(data))


def protect(path: str, *, recursive: bool) -> None:
    """Make a mount read-only, without setuid programs and devices; its other flags stay."""
    attributes = struct.pack(
        "QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0
    )
    call(
        "syscall",
        SYS_MOUNT_SETATTR,
        AT_FDCWD,
        _bytes(path),
        AT_RECURSIVE if recursive else 0,
        attributes,
        ctypes.c_size_t(len(attributes)),
    )


def leave_namespaces() -> None:
    """Move into new namespaces: network (without interfaces), mounts, processes, IPC, host name.

    Without root also a user namespace, which gives the right to the others.
    """
    flags = CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        call("unshare", flags)
        return
    call("unshare", CLONE_NEWUSER | flags)
    for name, content in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)


def _shown_paths() -> list[str]:
    """What the machine shows inside the box: the interpreter, its libraries and three devices."""
    paths = [
        "/usr",
        "/lib",
        "/lib64",
        "/bin",
        "/etc/localtime",
        "/etc/ld.so.cache",
        "/dev/null",
        "/dev/zero",
        "/dev/urandom",
    ]
    prefixes = {sys.base_prefix, sys.base_exec_prefix}
    return paths + [prefix for prefix in prefixes if not f"{prefix}/".startswith("/usr/")]


def _show(path: str, box: str) -> None:
    """Mount the machine's `path` inside `box`, read-only unless it is a device."""
    inside = box + path
    if not os.path.exists(path):
        return
    os.makedirs(os.path.dirname(inside), exist_ok=True)
    if os.path.islink(path):
        if os.path.isdir(path):
            os.symlink(os.path.realpath(path), inside)
        return
    if os.path.isdir(path):
        os.makedirs(inside, exist_ok=True)
    else:
        os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
    mount(path, inside, None, MS_BIND | MS_REC)
    if not path.startswith("/dev/"):
        protect(inside, recursive=True)


def empty_box(path: str, uid: int, gid: int, size_mb: int) -> None:
    """Mount an empty directory in memory at `path`, of `size_mb` MiB and few files, that belongs to
    `uid` and `gid`.
    """
    options = f"size={size_mb}m,nr_inodes={_BOX_FILES},mode=0700,uid={uid},gid={gid}"
    mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, options)


def clear_box(uid: int, gid: int, size_mb: int) -> None:
    """Put an empty /box in the place of the old one, whose processes have ended."""
    os.chdir("/")
    call("umount2", _bytes("/box"), MNT_DETACH)
    empty_box("/box", uid, gid, size_mb)
    os.chdir("/box")


def own_ipc() -> None:
    """Move into a namespace of shared memory and queues of its own, which ends with its last
    process.
    """
    call("unshare", CLONE_NEWIPC)


def own_root(box: str, uid: int, gid: int, size_mb: int, files: str | None = None) -> None:
    """Make `box` the root directory: the interpreter's files (read-only), three devices, the
    directory `files` as /files (read-only), and an empty /box of `size_mb` MiB that belongs to
    `uid` and `gid`. Nothing else of the machine's file system can be reached any more.
    """
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", box, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")
    for path in _shown_paths():
        _show(path, box)
    if files is not None:
        os.makedirs(f"{box}/files")
        mount(files, f"{box}/files", None, MS_BIND)
        protect(f"{box}/files", recursive=True)
    os.makedirs(f"{box}/box")
    os.makedirs(f"{box}/old")
    os.symlink("/box", f"{box}/tmp")
    empty_box(f"{box}/box", uid, gid, size_mb)
    os.chdir(box)
    call("syscall", SYS_PIVOT_ROOT, _bytes("."), _bytes("old"))
    os.chdir("/")
    call("umount2", _bytes("/old"), MNT_DETACH)
    os.rmdir("/old")
    protect("/", recursive=False)
    os.chdir("/box")
