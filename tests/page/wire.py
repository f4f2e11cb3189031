"""What goes over the wire: a relay between browser and server that keeps all that the server says."""

import re
import socket
import threading
from contextlib import suppress


class Wire:
    """Listens on 127.0.0.1 at `port` and passes connections on to `server`; `said` is every byte of the answers, also
    of event streams that the browser forgets. Asks for answers that are not compressed."""

    def __init__(self, server: int) -> None:
        self.server = server
        self.said: list[bytearray] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """No more connections."""
        self.listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                browser, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.server))
                said = bytearray()
                self.said.append(said)
                for way in ((browser, server, None), (server, browser, said)):
                    threading.Thread(target=self._pass_on, args=way, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, said: bytearray | None) -> None:
        with suppress(OSError):  # one of them hung up
            while part := source.recv(1 << 16):
                if said is None:
                    part = re.sub(
                        rb"(?i)(accept-encoding:)[^\r]*", lambda m: m[1] + b" " * (len(m[0]) - len(m[1])), part
                    )
                else:
                    said += part
                target.sendall(part)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
