"""`mantle-emojivoto web|emoji|voting|vote-bot`: one program, four containers, configured by environment."""

import os
import sys


def main() -> None:
    command = sys.argv[1:]
    if command == ["emoji"]:
        from mantle_emojivoto.emoji import main as run
    elif command == ["voting"]:
        from mantle_emojivoto.voting import main as run
    elif command == ["web"]:
        from mantle_emojivoto.web import main as run
    elif command == ["vote-bot"]:
        from mantle_emojivoto.votebot import main as run
    else:
        print("usage: mantle-emojivoto web|emoji|voting|vote-bot", file=sys.stderr)
        raise SystemExit(2)
    try:
        run(os.environ)
    except KeyError as missing:
        print(f"mantle-emojivoto: the environment variable {missing.args[0]} is not set", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
