"""The load of the fault plays, run inside a meshed pod: asks one URL in turn and says what failed, each second.

    python3 -c "$(cat load.py)" URL

One line a second: `TOTAL FAILED LAST-FAILURE`. A request is asked once: what the mesh does not hide is counted.
"""

import sys
import time
import urllib.request

url = sys.argv[1]
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
total, failed, why, told = 0, 0, "-", time.monotonic()
while True:
    try:
        with opener.open(url, timeout=10) as answer:
            answer.read()
    except Exception as error:
        failed, why = failed + 1, f"{type(error).__name__}:{error}".replace(" ", "_")
    total += 1
    if time.monotonic() - told >= 1:
        told = time.monotonic()
        print(total, failed, why, flush=True)
    time.sleep(0.02)
