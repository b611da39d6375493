"""`python -m torchrft.config …` checks a job's flags without starting it; run_train.sh calls it.

Exits with 0 if the job may start, 2 with one line per fault, 10 after --help or --dry_run.
"""

import sys

from torchrft.config.manager import check_only
from torchrft.rewards.verify import reward_faults

if __name__ == "__main__":
    sys.exit(check_only(sys.argv[1:], reward_faults))
