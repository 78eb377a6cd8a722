"""One run per folder: while a process writes into a run's folder, no other process may.

The lock is the kernel's (flock) on the file train.lock. The kernel ends it with its process,
however that process dies, so a lock file that is left over never stops the next run. The file's
text (process id and host) is only for the message. Without flock (Windows) nothing is locked.
"""

import contextlib
import os
import socket

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "train.lock"


@contextlib.contextmanager
def locked(folder):
    """Make the folder and hold its lock for the length of the with block.

    A folder that was made and left empty is removed again. Raises ValueError, with the process id,
    if another process holds it; OSError if it cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(folder / NAME) if fcntl else None
    try:
        yield
    finally:
        if descriptor is not None:
            (folder / NAME).unlink(
                missing_ok=True
            )  # before the lock ends: later it may be another's
            os.close(descriptor)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _acquire(path):
    """The descriptor of the locked file, which names this process."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 300).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"{path.parent} is in use by {holder or 'another process'}: "
                f"let it end or stop it, or name another --out"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"note: cannot lock {path.parent} ({error.strerror}); start no other run there")
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # the process that held it removed it after we had opened it
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _is_at(descriptor, path):
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
