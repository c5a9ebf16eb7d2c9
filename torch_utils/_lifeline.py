"""Open connections between the processes of a run, so that none of them waits for one that is gone.

A dead process answers no more, and a collective operation waits for its answer as long as its time limit allows, which
has to exceed the longest evaluation. But the operating system closes the connections of a process at its death, however
it died, and while the process lives it keeps them, however busy the interpreter is. So every process holds a connection
to rank 0 and a thread that reads from it. Rank 0 tells the others who is gone; if it is rank 0, they all notice.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from typing import Any

import torch

CONNECT_SECONDS = 45  # for ranks that have all found the store
GRACE_SECONDS = 5  # for a rank to end with a message of its own, or to finish writing a file, when another has ended

_alive: "weakref.WeakSet[Lifeline]" = weakref.WeakSet()


class Lifeline:
    """This process's part in watching over all of them.

    Args:
        store: seen by all ranks; tells them where rank 0 listens.
        rank: of this process.
        size: number of processes.
        lost_after: seconds until a machine that has gone silent (power, network) counts as lost. The death of a process
            on a living machine is noticed at once.

    Raises:
        ConnectionError: ranks did not connect in time; the message names them.
    """

    def __init__(self, store: torch.distributed.Store, rank: int, size: int, lost_after: float = 30):
        self.rank, self.size, self._lost_after = rank, size, lost_after
        self._peers: dict[socket.socket, dict[str, Any]] = {}
        self._lock = threading.RLock()
        self._word: dict[str, Any] | None = None  # why the run ends early
        self._heard, self._finished = threading.Event(), threading.Event()
        self._done: set[int] = set()
        self._left = False
        me = {"rank": rank, "name": f"rank {rank} of {size} (pid {os.getpid()} on {socket.gethostname()})"}
        self._name = me["name"]
        if rank == 0:
            self._accept(store, me)
        else:
            self._connect(store, me)
        _alive.add(self)
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for all ranks to come to their end, then close the connections."""
        self._tell({"done": self.rank})
        if self.rank == 0:
            self._count(0)
        self._finished.wait()
        self._thread.join(GRACE_SECONDS)

    def fail(self, error: BaseException, by_peer: bool) -> None:
        """Tell all ranks that this one ends with an error; returns, so that the error is reported here.

        Args:
            error: what happened.
            by_peer: the error is of the kind that another rank's end causes. If that is so, its name is what
                the user needs: this process ends at once with a message that says it, and this does not return.
        """
        if by_peer and self._heard.wait(GRACE_SECONDS):
            self._end()
        with self._lock:
            self._left = True
            if self._word is None:
                interrupted = isinstance(error, KeyboardInterrupt)
                lines = str(error).splitlines() or [""]
                reason = f"failed with {type(error).__name__}: {lines[0]}".rstrip(" :")
                text = f"{self._name} {'was interrupted' if interrupted else reason}"
                self._tell({"word": {"text": text, "status": 130 if interrupted else 1}})

    # ------------------------------------------------------------------------------------------------------------------

    def _accept(self, store: torch.distributed.Store, me: dict[str, Any]) -> None:
        token, deadline = secrets.token_hex(16), time.monotonic() + CONNECT_SECONDS
        with _listen() as server:
            where = {"hosts": _own_addresses(), "port": server.getsockname()[1], "token": token, **me}
            store.set("lifeline", json.dumps(where))
            while len(self._peers) < self.size - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    peer, _ = server.accept()
                except TimeoutError:
                    missing = {*range(1, self.size)} - {peer["rank"] for peer in self._peers.values()}
                    raise ConnectionError(self._unreachable(f"rank {', '.join(map(str, sorted(missing)))}")) from None
                hello = _first_line(peer)
                if hello.pop("token", None) != token:  # somebody else's connection
                    peer.close()
                    continue
                self._keep(peer, hello)

    def _connect(self, store: torch.distributed.Store, me: dict[str, Any]) -> None:
        where = json.loads(store.get("lifeline"))
        for host in where["hosts"]:
            with contextlib.suppress(OSError):
                peer = socket.create_connection((host, where["port"]), timeout=CONNECT_SECONDS / len(where["hosts"]))
                peer.sendall(json.dumps({"token": where["token"], **me}).encode() + b"\n")
                self._keep(peer, {"rank": 0, "name": where["name"]})
                return
        raise ConnectionError(self._unreachable(f"{where['name']}, {' or '.join(where['hosts'])}:{where['port']}"))

    def _unreachable(self, who: str) -> str:
        return (
            f"rank {self.rank} has no connection with {who} after {CONNECT_SECONDS} s; see whether all are running and "
            "whether a firewall keeps their machines apart"
        )

    def _keep(self, peer: socket.socket, who: dict[str, Any]) -> None:
        peer.settimeout(GRACE_SECONDS)  # for sending; a few bytes at a time never have to wait
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        third = max(round(self._lost_after / 3), 1)
        for option, value in {
            "TCP_KEEPIDLE": third,
            "TCP_KEEPALIVE": third,  # the same on macOS
            "TCP_KEEPINTVL": max(third // 2, 1),
            "TCP_KEEPCNT": 4,
            "TCP_USER_TIMEOUT": round(self._lost_after * 1000),
        }.items():
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._peers[peer] = {**who, "unread": b""}

    # ------------------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    if not self._read(key.fileobj):
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
                if self._heard.is_set():
                    time.sleep(GRACE_SECONDS)
                    if not self._left:
                        self._end()
                    return

    def _read(self, peer: socket.socket) -> bool:
        """Take in what came; False where nothing more will."""
        who = self._peers[peer]
        try:
            content = peer.recv(4096)
        except OSError:
            content = b""
        if not content:
            if who["rank"] not in self._done and not self._finished.is_set():
                text = f"{who['name']} died without a message, as when it is killed or out of memory"
                self._hear({"text": text, "status": 1})
            return False
        *lines, who["unread"] = (who["unread"] + content).split(b"\n")
        for message in map(json.loads, lines):
            if "word" in message:
                self._hear(message["word"])
            elif "done" in message:
                self._count(message["done"])
            else:
                self._finished.set()
        return not self._finished.is_set() or self.rank == 0

    def _count(self, rank: int) -> None:
        """Rank 0 only: one more has come to its end."""
        with self._lock:
            self._done.add(rank)
            if len(self._done) == self.size:
                self._finished.set()
                self._tell({"finished": True})

    def _hear(self, word: dict[str, Any]) -> None:
        with self._lock:
            if self._word is None and not self._left:
                self._word = word
                if self.rank == 0:
                    self._tell({"word": word})
            self._heard.set()

    def _tell(self, message: dict[str, Any]) -> None:
        with self._lock:
            for peer in self._peers:
                with contextlib.suppress(OSError):
                    peer.sendall(json.dumps(message).encode() + b"\n")

    def _end(self) -> None:
        # The main thread may be waiting inside a library for ever: nothing gentler than this ends it.
        text = f"error: {self._word['text']}; rank {self.rank} ends with it\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        os._exit(self._word["status"])

    def _close_copies(self) -> None:
        for peer in self._peers:
            peer.close()


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _first_line(peer: socket.socket) -> dict[str, Any]:
    """The JSON object that a new connection begins with, and nothing of what follows; empty for anything else."""
    line = b""
    with contextlib.suppress(OSError, ValueError):
        peer.settimeout(GRACE_SECONDS)
        while len(line) < 1000 and (byte := peer.recv(1)) not in (b"", b"\n"):
            line += byte
        content = json.loads(line)
        return content if isinstance(content, dict) else {}
    return {}


def _own_addresses() -> list[str]:
    """Names and numbers under which other machines, or at least this one, may reach this process."""
    master, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", 1))
    found = [socket.gethostname(), master]
    with contextlib.suppress(OSError):
        family, kind, _, _, address = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing; finds the interface on the way there
            found.insert(0, probe.getsockname()[0])
    return list(dict.fromkeys(found))


def _after_fork() -> None:
    # A forked data loader that outlives its parent would keep the parent's connections open.
    for lifeline in _alive:
        lifeline._close_copies()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
