"""The load of the fault plays, run inside a meshed pod: asks one URL in turn and says what failed, each second.

    python3 -c "$(cat load.py)" URL

One line a second: `TOTAL FAILED LAST-FAILURE`. A request is asked once: what the mesh does not hide is counted. The
name is looked up until there is an answer: what DNS does on a busy machine is not what is measured.
"""

import socket
import sys
import time
import urllib.parse
import urllib.request

url = urllib.parse.urlsplit(sys.argv[1])
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def address(name):
    while True:
        try:
            return socket.gethostbyname(name)
        except OSError:
            time.sleep(0.2)


total, failed, why, told = 0, 0, "-", time.monotonic()
while True:
    request = urllib.request.Request(f"http://{address(url.netloc)}{url.path}", headers={"Host": url.netloc})
    try:
        with opener.open(request, timeout=30) as answer:
            answer.read()
    except Exception as error:
        failed, why = failed + 1, f"{type(error).__name__}:{error}".replace(" ", "_")
    total += 1
    if time.monotonic() - told >= 1:
        told = time.monotonic()
        print(total, failed, why, flush=True)
    time.sleep(0.02)
