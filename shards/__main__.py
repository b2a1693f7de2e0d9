"""`python -m shards`: one shard process."""

from shards.process import main

if __name__ == "__main__":
    raise SystemExit(main())
