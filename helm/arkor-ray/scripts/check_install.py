# `helm test`: the API is ready, through its Service; Ray's dashboard gives nothing to whoever has no token.
import os
import socket
import sys
import time
import urllib.error
import urllib.request

api, head = os.environ["API"], os.environ["HEAD"]
deadline, said = time.monotonic() + float(os.environ["WAIT"]), ""
while True:
    try:
        with urllib.request.urlopen(f"{api}/readyz", timeout=20) as answer:
            print(f"{api}/readyz: {answer.status} {answer.read().decode()}")
            break
    except urllib.error.HTTPError as error:
        said = f"{error.code} {error.read().decode(errors='replace')[:500]}"
    except OSError as error:
        said = str(error)
    if time.monotonic() > deadline:
        sys.exit(f"{api}/readyz is not ready: {said}")
    time.sleep(min(5, max(0, deadline - time.monotonic())))

host, _, port = head.partition(":")
socket.getaddrinfo(host, int(port))  # a name that leads nowhere would look like a closed port
try:
    with urllib.request.urlopen(f"http://{head}/api/jobs/", timeout=10) as answer:
        sys.exit(f"Ray's dashboard at {head} answers {answer.status} without a token")
except urllib.error.HTTPError as error:
    if error.code not in (401, 403):
        sys.exit(f"Ray's dashboard at {head} answers {error.code} without a token, not 401")
    print(f"{head} refuses without a token: {error.code}")
except OSError as error:
    print(f"{head} cannot be reached from here: {error}")
