#!/usr/bin/env bash
# Ends what start.sh started in FOLDER.
set -uo pipefail
for daemon in slurmd slurmctld munged; do
    if [ -f "$1/$daemon.pid" ]; then kill "$(cat "$1/$daemon.pid")"; fi
done
