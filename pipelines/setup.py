"""Create the tracking store and an experiment for every paper, before anything runs: `python -m pipelines.setup`.

Processes that meet on a store that is not there yet break it, so it is made here, once and serially.
"""

from __future__ import annotations

import sys

from common import params, tracking


def main() -> int:
    """The exit status: 1 for an address that cannot work; a store that is out of reach is no reason to stop."""
    try:
        _, papers = params.house()
        print(f"resparse: {tracking.setup(papers)}")
    except (params.ParamError, tracking.TrackingError) as error:
        print(f"resparse: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # whatever the store or the way to it throws
        print(f"resparse: no tracking store ({tracking.reason(error)}); runs go on without it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
