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
# Sockets; other processes and what is theirs; programs; memory and messages that outlive the process; what
# Landlock does not know of files (owner, mode, times, attributes); the kernel's own.
FORBIDDEN = (
    *(41, 42, 43, 44, 45, 46, 47, 49, 50, 53, 288, 299, 307),  # socket ... listen, socketpair, accept4, *mmsg
    *(57, 58, 59, 322),  # fork, vfork, execve, execveat
    *(62, 200, 129, 297, 424, 434, 438),  # kill, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_*
    *(101, 310, 311, 302, 312, 141, 144, 203),  # ptrace, process_vm_*, prlimit64, kcmp, priorities, affinity
    *(29, 30, 31, 64, 65, 66, 68, 69, 70, 71, 240, 241),  # shm*, sem*, msg*, mq_open, mq_unlink
    *(133, 259, 164, 159, 103, 163, 172, 173, 153, 179, 443, 304),  # devices and what is root's
    *(
        220,
        142,
        314,
        251,
        256,
        279,
        440,
        300,
        253,
        294,
        254,
    ),  # semtimedop, others' schedules and pages, watching
    *(76, 90, 91, 92, 93, 94, 260, 268, 452, 132, 235, 261, 280, 188, 189, 190, 197, 198, 199, 463, 466),
    *(425, 426, 427, 321, 298, 323, 248, 249, 250),  # io_uring, bpf, perf_event_open, userfaultfd, keys
    *(155, 161, 165, 166, 272, 308, 428, 429, 430, 431, 432, 433, 442),  # roots, mounts, namespaces
    *(
        167,
        168,
        169,
        175,
        176,
        246,
        313,
        320,
        227,
        305,
        170,
        171,
    ),  # swap, reboot, modules, kexec, clocks, names
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
