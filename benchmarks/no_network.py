"""A whole list of real web addresses with no network: how long, and what became of every row.

    make bench-no-network        python benchmarks/no_network.py [LIST] [--seconds N]

The list is that of ../shared/data (LAION's columns: URL, TEXT) unless another one is named. Every lookup of a name
fails, as it does on a machine that has no network; on one that has, the name servers are switched off for this
process (`--offline`), so the figure is the same. Ends with 1 if it took longer than asked, or a row is unaccounted for.
"""

import argparse
import socket
import sys
import tempfile
import time
from pathlib import Path

from vlmpipe.curate import ledger
from vlmpipe.curate.fetch import download
from vlmpipe.curate.pool import PoolConfig
from vlmpipe.curate.sources.flavours import Columns
from vlmpipe.dispatch import Cluster
from vlmpipe.errors import UserError
from vlmpipe.shards import read_manifest, read_rows

LIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "url-lists" / "laion_like_10000.parquet"
SECONDS = 180.0


def main() -> int:
    options = _options()
    if options.offline:
        socket.getaddrinfo = _no_name_server
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, state = Path(folder) / "pool", Path(folder) / "state"
        config = PoolConfig(urls=str(options.list), columns=Columns(url=options.url, caption=options.caption))
        try:
            download("offline", options.list, out, state, config, Cluster(backend="inline"))
        except UserError as error:
            print(f"it said: {error}")
        seconds = time.monotonic() - started
        manifest, lines = read_manifest(out), ledger.summary(state)
        with_reason = sum(reason is not None for reason in read_rows(out, ["reason"])["reason"].to_pylist())
        ledger.show("offline", lines, 5)
    whole = manifest["rows"] == lines["rows"] == manifest["downloaded"] + with_reason
    print(f"{manifest['rows']} rows in {seconds:.1f} s (target: under {options.seconds:g} s); in the ledger "
          f"{lines['rows']}; downloaded {manifest['downloaded']}, with a reason {with_reason}: "
          f"{'all' if whole else 'NOT all'} accounted for")
    return 0 if whole and seconds < options.seconds else 1


def _no_name_server(*_: object, **__: object) -> list:
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", nargs="?", type=Path, default=LIST)
    parser.add_argument("--url", default="URL", help="the list's column of addresses (default: URL)")
    parser.add_argument("--caption", default="TEXT", help="the list's column of captions (default: TEXT)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"the target (default: {SECONDS:g})")
    parser.add_argument("--offline", action="store_true", help="fail every name lookup, on a machine with a network")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
