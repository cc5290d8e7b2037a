#!/usr/bin/env bash
# A SLURM of one node on this machine, for tests: bash tests/slurm/start.sh FOLDER, as root, where slurm-wlm and munge are installed.
# Nothing outside FOLDER is written. Then: SLURM_CONF=FOLDER/slurm.conf sbatch ...; and at the end: bash tests/slurm/stop.sh FOLDER
set -euo pipefail
folder=$(realpath -m "$1")
mkdir -p "$folder"/{state,spool}
cd "$folder"
read -r controller node < <(python3 -c 'import socket
found = [socket.socket() for _ in range(2)]
for s in found: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in found))')

head -c 1024 /dev/urandom > munge.key
chmod 400 munge.key
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"

# The node claims what the scripts in slurm/ ask for. `cred_expire` is also how long a job waits when it is put back into the queue: two minutes by default.
cat > slurm.conf <<CONF
ClusterName=aam
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$controller
SlurmdPort=$node
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
GresTypes=gpu
NodeName=here NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 CPUs=64 RealMemory=512000 Gres=gpu:8 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
touch gpu{0..7} # what a GPU's device file would be
echo "NodeName=here Name=gpu File=$folder/gpu[0-7]" > gres.conf
export SLURM_CONF=$folder/slurm.conf
slurmctld
slurmd -N here
for _ in $(seq 100); do
    if [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ]; then exit 0; fi
    sleep 0.2
done
echo 'SLURM did not start:' >&2
tail -n 20 slurmctld.log slurmd.log >&2
exit 1
