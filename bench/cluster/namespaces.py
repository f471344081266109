"""A node's network: a namespace of its own, whose only way out is a device that a process reads and writes.

The system is called directly. A namespace without a name, held by descriptors, is gone with the last process that
knows it, however that ends: nothing can be left over. `ip netns` keeps names on the disk instead.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWNET = 0x00020000, 0x20000000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_PR_SET_PDEATHSIG = 1
_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8913, 0x8914, 0x8916, 0x891C
_SIOCSIFMTU, _SIOCSIFTXQLEN = 0x8922, 0x8943
_IFF_UP = 1

DEVICE = "wire"
"""The interface between nodes, in every node."""

SUBNET = bytes((10, 77, 0))
"""Node i is 10.77.0.(i + 1)."""

_TUN = "/dev/net/tun"
_HERE = "/proc/thread-self/ns/net"

_QUEUE = 10_000
"""Frames that may wait for the switch to read them: beyond that the kernel drops."""

_SYSTEM = {
    # Wires lose nothing. Reno is in every kernel and fills the receiver's window then; some probe, and waste the rate.
    "net/ipv4/tcp_congestion_control": "reno",
    # No connection starts slower than it went on before a pause, or as another one left it.
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_no_metrics_save": "1",
    # What is late is queued, never lost: to send it twice would only take the wire's time.
    "net/ipv4/tcp_early_retrans": "0",
    "net/ipv4/tcp_rto_min_us": "2000000",
    # No greetings to neighbours: counters then hold what programs sent.
    f"net/ipv6/conf/{DEVICE}/disable_ipv6": "1",
}


class Traffic(NamedTuple):
    """Bytes on a node's wires, headers included."""

    sent: int
    received: int


@dataclass(frozen=True)
class Namespace:
    """Two open files: the namespace itself, and the other end of its device."""

    fd: int
    device: int


def address(node: int) -> str:
    """The address of a node."""
    return ".".join(map(str, (*SUBNET, node + 1)))


def create(node: int, mtu: int, buffer: int) -> Namespace:
    """A namespace with `lo` and the node's device, both up.

    `buffer` bounds what a connection may have under way. To the kernel the device is infinitely fast: what is under
    way, beyond what the wires hold, waits in the switch, where nobody can take it back.
    """
    with _restored():
        _call("unshare", CLONE_NEWNET)
        fd = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            device = _open_device(node, mtu)
            for direction in ("rmem", "wmem"):
                _set(f"net/ipv4/tcp_{direction}", f"4096 {buffer} {buffer}")
        except BaseException:
            os.close(fd)
            raise
    return Namespace(fd, device)


@contextmanager
def inside(fd: int) -> Iterator[None]:
    """In here, what the calling thread opens and starts belongs to the namespace."""
    with _restored():
        enter(fd)
        yield


def enter(fd: int) -> None:
    """Move the calling thread into the namespace."""
    _call("setns", fd, CLONE_NEWNET)


def own_processes() -> None:
    """Give the next child of this process a numbering of processes of its own, in which it is the first.

    When the first one ends, the kernel ends all others. Mounts are made private, so that the child can have a /proc.
    """
    _call("unshare", CLONE_NEWPID | CLONE_NEWNS)
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)


def mount_proc() -> None:
    """Make /proc that of the calling process's own numbering."""
    _call("mount", b"proc", b"/proc", b"proc", 0, None)


def die_with_parent() -> None:
    """Have the kernel end this process when the thread that started it ends, even if that was killed."""
    _call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def traffic() -> Traffic:
    """What the node has sent and received so far; for a program in a node, and its calling thread."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == DEVICE:
            values = counts.split()
            return Traffic(sent=int(values[8]), received=int(values[0]))
    raise RuntimeError(f"traffic: there is no device {DEVICE} here: call it in a node of a Cluster")


def unavailable() -> str | None:
    """Why this machine cannot emulate nodes, in one sentence; None if it can."""
    if sys.platform != "linux":
        return f"emulated nodes need Linux, not {sys.platform}"
    if os.geteuid() != 0:
        return "emulated nodes need root"
    if not os.path.exists(_TUN):
        return f"emulated nodes need {_TUN}, which this machine has not"
    try:
        made = create(0, mtu=1500, buffer=2**17)
    except OSError as error:
        return f"this machine lets no emulated node be made: {error}"
    os.close(made.device)
    os.close(made.fd)
    return None


def _open_device(node: int, mtu: int) -> int:
    # IP packets, not Ethernet frames: there are no neighbours to ask for and no hardware addresses to invent.
    device = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(device, _TUNSETIFF, _request(DEVICE, struct.pack("H", _TUN_WITHOUT_HEADER)))
            for request, value in (
                (_SIOCSIFMTU, struct.pack("i", mtu)),
                (_SIOCSIFTXQLEN, struct.pack("i", _QUEUE)),
                (_SIOCSIFADDR, _socket_address(address(node))),
                (_SIOCSIFNETMASK, _socket_address("255.255.255.0")),
            ):
                fcntl.ioctl(control, request, _request(DEVICE, value))
            for path, setting in _SYSTEM.items():
                _set(path, setting)
            for name in ("lo", DEVICE):
                (flags,) = struct.unpack_from("H", fcntl.ioctl(control, _SIOCGIFFLAGS, _request(name, b"")), 16)
                fcntl.ioctl(control, _SIOCSIFFLAGS, _request(name, struct.pack("H", flags | _IFF_UP)))
    except BaseException:
        os.close(device)
        raise
    return device


def _set(path: str, value: str) -> None:
    setting = Path("/proc/sys", path)
    if setting.exists():  # older kernels lack some, and IPv6 can be left out
        setting.write_text(value)


def _request(name: str, value: bytes) -> bytes:
    return struct.pack("16s24s", name.encode(), value)


def _socket_address(dotted: str) -> bytes:
    return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(dotted))


@contextmanager
def _restored() -> Iterator[None]:
    """Bring the calling thread back to the namespace it was in."""
    home = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        _call("setns", home, CLONE_NEWNET)
        os.close(home)


def _call(name: str, *arguments: int | bytes | None) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
