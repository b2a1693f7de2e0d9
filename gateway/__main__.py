"""`python -m gateway`: the gateway process."""

from gateway.process import main

if __name__ == "__main__":
    raise SystemExit(main())
