#!/usr/bin/env bash
# uvloop 0.23.0 (libuv) accepts one connection in each turn of its event loop, asyncio of Python all
# that wait. A server whose turns take milliseconds, because it works, lets new connections wait in
# the kernel's queue, where it can neither count nor refuse them: load shedding by the number of
# requests in the process never begins.
#
# Output seen (50 connections that wait before the loop turns):
#   asyncio: 50 accepted in turns: 1
#   uvloop: 50 accepted in turns: 50
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check uvloop==0.23.0
cat > "$work/accept.py" <<'P'
import asyncio
import socket

import uvloop

COUNT = 50


async def turns() -> int:
    accepted, turn = [], 0

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport):
            accepted.append(turn)

    loop = asyncio.get_running_loop()
    server = await loop.create_server(Protocol, "127.0.0.1", 0, backlog=2 * COUNT)
    address = server.sockets[0].getsockname()
    clients = [socket.create_connection(address) for _ in range(COUNT)]
    while len(accepted) < COUNT:
        turn += 1
        await asyncio.sleep(0)
    server.close()
    for client in clients:
        client.close()
    return len(set(accepted))


for name, run in (("asyncio", asyncio.run), ("uvloop", uvloop.run)):
    print(f"{name}: {COUNT} accepted in turns: {run(turns())}")
P
seen="$("$work/venv/bin/python" "$work/accept.py")"
echo "$seen"
[ "$seen" = "asyncio: 50 accepted in turns: 1
uvloop: 50 accepted in turns: 50" ]
