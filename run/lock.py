"""A lock on a run's folder: only one process at a time may write into it.

The lock is the kernel's flock on the file train.lock. The kernel releases it when the process ends,
however it ends, so a leftover lock file never blocks the next run. The text in the file (process id
and host) is only for the error message. Without flock (Windows) nothing is locked.
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
    """Create the folder and hold its lock during the with block.

    A folder that was created here is deleted again if it is empty at the end. Raises ValueError,
    with the process id, if another process holds the lock; also if the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = acquire(path) if fcntl else None
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
        raise ValueError(f"cannot write to the folder {folder} ({why})") from None
    try:
        yield
    finally:
        if descriptor is not None:
            # Before the lock is released: after that, another process may own the file.
            path.unlink(missing_ok=True)
            os.close(descriptor)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def acquire(path):
    """Lock the file and write this process into it. Returns its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 300).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"{path.parent} is in use by {holder or 'another process'}: "
                f"wait for it or stop it, or name another --out"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"note: cannot lock {path.parent} ({error.strerror}); start no other run there")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # its holder deleted the file after we opened it
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor
