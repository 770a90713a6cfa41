"""What the sandbox's process runs: give up all that the program must not have, then run it.

It imports nothing of ours, and runs as `python -I -S confined.py FOLDER CPU_S MEMORY_BYTES FOLDER_BYTES`.
Where it could confine itself and FOLDER/program.py ran to its end, it writes "done". That is a guard against
accidents: a program that knows of this file could write it, too.
Numbers are Linux's on x86-64 (<asm/unistd_64.h>, <linux/landlock.h>, <linux/seccomp.h>, <linux/filter.h>).
"""

import ctypes
import os
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path

PROGRAM, DONE, CANNOT_CONFINE = "program.py", b"done", 77
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
CAPSET, CAPABILITIES_V3 = 126, 0x20080522
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
MAKE_CHAR, MAKE_BLOCK, SCOPE_SIGNAL = 1 << 6, 1 << 11, 2
ALL_OF_FIRST_VERSION = (1 << 13) - 1
REFER, TRUNCATE = 1 << 13, 1 << 14
ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
X86_64 = 0xC000003E
CLONE, CLONE3, CLONE_THREAD, TGKILL, FCNTL, IOCTL = 56, 435, 0x00010000, 234, 72, 16
# Of fcntl: who gets a signal, and which (F_SETOWN, F_SETSIG, F_SETOWN_EX); of ioctl: likewise.
SIGNALLING = ((FCNTL, 8), (FCNTL, 10), (FCNTL, 15), (IOCTL, 0x8901), (IOCTL, 0x8902))


def _numbers(*calls: str) -> tuple[int, ...]:
    """Each after its name."""
    return tuple(int(number) for line in calls for number in line.split()[1::2])


# What is refused, beside what Landlock forbids of files: calls with their numbers on x86-64.
FORBIDDEN = _numbers(
    # Sockets.
    "socket 41 connect 42 accept 43 sendto 44 recvfrom 45 sendmsg 46 recvmsg 47 bind 49 listen 50",
    "socketpair 53 accept4 288 recvmmsg 299 sendmmsg 307",
    # Other processes, programs, and what is theirs: signals, memory, limits, priorities, schedules, pages.
    "fork 57 vfork 58 execve 59 execveat 322 ptrace 101 process_vm_readv 310 process_vm_writev 311 kcmp 312",
    "kill 62 tkill 200 rt_sigqueueinfo 129 rt_tgsigqueueinfo 297",
    "pidfd_send_signal 424 pidfd_open 434 pidfd_getfd 438",
    "prlimit64 302 setpriority 141 ioprio_set 251",
    "sched_setparam 142 sched_setscheduler 144 sched_setaffinity 203 sched_setattr 314",
    "migrate_pages 256 move_pages 279 process_madvise 440",
    # Memory and messages that outlive the process.
    "shmget 29 shmat 30 shmctl 31 semget 64 semop 65 semctl 66 semtimedop 220",
    "msgget 68 msgsnd 69 msgrcv 70 msgctl 71 mq_open 240 mq_unlink 241",
    # What Landlock does not know of files: size by name, owner, mode, times, attributes, and watching them.
    "truncate 76 chmod 90 fchmod 91 fchmodat 268 fchmodat2 452 chown 92 fchown 93 lchown 94 fchownat 260",
    "utime 132 utimes 235 futimesat 261 utimensat 280",
    "setxattr 188 lsetxattr 189 fsetxattr 190 setxattrat 463",
    "removexattr 197 lremovexattr 198 fremovexattr 199 removexattrat 466",
    "inotify_init 253 inotify_add_watch 254 inotify_init1 294 fanotify_init 300 open_by_handle_at 304",
    # Ways around a filter of calls.
    "io_uring_setup 425 io_uring_enter 426 io_uring_register 427",
    "bpf 321 perf_event_open 298 userfaultfd 323 add_key 248 request_key 249 keyctl 250",
    # Devices, roots, mounts, namespaces, and what else is root's.
    "mknod 133 mknodat 259 pivot_root 155 chroot 161 mount 165 umount2 166 unshare 272 setns 308",
    "open_tree 428 move_mount 429 fsopen 430 fsconfig 431 fsmount 432 fspick 433 mount_setattr 442",
    "syslog 103 vhangup 153 acct 163 iopl 172 ioperm 173 quotactl 179 quotactl_fd 443",
    "swapon 167 swapoff 168 reboot 169 sethostname 170 setdomainname 171",
    "init_module 175 delete_module 176 finit_module 313 kexec_load 246 kexec_file_load 320",
    "adjtimex 159 settimeofday 164 clock_settime 227 clock_adjtime 305",
)


def confine(folder: str, cpu_s: int, memory_bytes: int, folder_bytes: int, keep: int) -> None:
    """Raise OSError where the kernel will not do it. Of open files those below 3 stay, and `keep`."""
    for what, limit in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, folder_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    os.closerange(3, keep)
    os.closerange(keep + 1, 256)
    libc = ctypes.CDLL(None, use_errno=True)

    def checked(found: int, what: str) -> int:
        if found < 0:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
        return found

    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _restrict_files(libc, checked, folder)
    nothing = ctypes.create_string_buffer(24)
    head = ctypes.create_string_buffer(struct.pack("=Ii", CAPABILITIES_V3, 0))
    checked(libc.syscall(CAPSET, head, nothing), "capabilities")
    _restrict_calls(libc, checked)


def _restrict_files(libc: ctypes.CDLL, checked: Callable[[int, str], int], folder: str) -> None:
    version = checked(libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1), "Landlock")
    handled = ALL_OF_FIRST_VERSION | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    rules = ctypes.create_string_buffer(struct.pack("QQQ", handled, 0, SCOPE_SIGNAL))
    size = 24 if version >= 6 else 8
    ruleset = checked(libc.syscall(LANDLOCK_CREATE_RULESET, rules, size, 0), "Landlock")
    read = READ_FILE | READ_DIR | EXECUTE
    places = {sys.prefix, sys.base_prefix, sys.exec_prefix, "/usr", "/lib", "/lib64", "/etc/ld.so.cache"}
    allowed = dict.fromkeys(places | {"/etc/localtime", "/proc/self"}, read)
    allowed |= {"/dev/null": READ_FILE | WRITE_FILE, "/dev/urandom": READ_FILE}
    allowed[folder] = handled & ~(MAKE_CHAR | MAKE_BLOCK)
    for place, access in allowed.items():
        try:
            descriptor = os.open(place, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not on this system
            continue
        if not Path(place).is_dir():
            access &= READ_FILE | WRITE_FILE | EXECUTE | TRUNCATE
        rule = ctypes.create_string_buffer(struct.pack("=Qi", access & handled, descriptor))
        checked(libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0), f"Landlock, {place}")
        os.close(descriptor)
    checked(libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def _restrict_calls(libc: ctypes.CDLL, checked: Callable[[int, str], int]) -> None:
    """A filter of Berkeley packets: code, jump if true, jump if false, constant."""
    load, equal, has_bits, at_least, give = 0x20, 0x15, 0x45, 0x35, 0x06
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, X86_64),
        (give, 0, 0, KILL),
        (load, 0, 0, 0),  # the number of the call
        (at_least, 0, 1, 0x40000000),  # those of x32
        (give, 0, 0, KILL),
        (equal, 0, 1, CLONE3),  # its flags are in memory: the C library then takes clone
        (give, 0, 0, ENOSYS),
    ]
    for number in FORBIDDEN:
        program += [(equal, 0, 1, number), (give, 0, 0, EPERM)]
    for number, command in SIGNALLING:
        program += [
            (equal, 0, 4, number),
            (load, 0, 0, 24),  # the second argument
            (equal, 0, 1, command),
            (give, 0, 0, EPERM),
            (load, 0, 0, 0),
        ]
    program += [
        (equal, 0, 4, TGKILL),
        (load, 0, 0, 16),  # the process
        (equal, 1, 0, os.getpid()),
        (give, 0, 0, EPERM),
        (give, 0, 0, ALLOW),
        (equal, 0, 3, CLONE),
        (load, 0, 0, 16),  # its flags
        (has_bits, 1, 0, CLONE_THREAD),
        (give, 0, 0, EPERM),
        (give, 0, 0, ALLOW),
    ]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    head = struct.pack("HxxxxxxP", len(program), ctypes.addressof(packed))
    checked(
        libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(head), 0, 0), "seccomp"
    )


def main() -> None:
    folder, cpu_s, memory_bytes, folder_bytes = sys.argv[1], *map(int, sys.argv[2:])
    program = (Path(folder) / PROGRAM).read_text(encoding="utf-8")
    answer = os.dup(1)  # where nothing that the program prints may go
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        confine(folder, cpu_s, memory_bytes, folder_bytes, keep=answer)
    except (OSError, AttributeError) as error:
        print(error, file=sys.stderr)
        os._exit(CANNOT_CONFINE)
    sys.argv = [PROGRAM]
    exec(compile(program, PROGRAM, "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    os.write(answer, DONE)
    os._exit(0)  # not the program's threads, nor what it left for the end


if __name__ == "__main__":
    main()
