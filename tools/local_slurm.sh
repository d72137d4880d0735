#!/usr/bin/env bash
# A real single-node SLURM on this machine, for trying out and testing the jobs in slurm/. Needs root, and packages of
# Debian or Ubuntu, which `install` downloads:
#
#   bash tools/local_slurm.sh install          slurmctld, slurmd, munge
#   bash tools/local_slurm.sh start [FOLDER]   daemons with state, logs and slurm.conf in FOLDER (/tmp/local_slurm)
#   bash tools/local_slurm.sh stop [FOLDER]    cancels the jobs and stops the daemons
#
# After `start`: export SLURM_CONF=FOLDER/slurm.conf, then use sbatch, squeue and scontrol as on a cluster. It has no
# accounting and no cgroups; real clusters also have site-specific settings. The partition `gpu` has 16
# imaginary nodes with 8 GPUs: `sbatch --test-only --partition=gpu` says where a job would run.
set -euo pipefail

command="${1:-}"
folder="${2:-/tmp/local_slurm}"
export SLURM_CONF="$folder/slurm.conf"

install_packages() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
}

write_configuration() {
    local memory
    memory="$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)"
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=17817
SlurmdPort=17818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,requeue_delay=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=60
MaxArraySize=1001
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$(hostname) Default=YES MaxTime=INFINITE State=UP
GresTypes=gpu
NodeName=gpu[1-16] NodeAddr=127.0.0.1 CPUs=96 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN
PartitionName=gpu Nodes=gpu[1-16] MaxTime=INFINITE State=UP
CONF
}

start() {
    mkdir -p "$folder"/{state,spool}
    write_configuration
    [ -s /etc/munge/munge.key ] || { dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none; }
    chown munge: /etc/munge/munge.key && chmod 400 /etc/munge/munge.key
    mkdir -p /run/munge && chown munge: /run/munge
    munge --no-input >/dev/null 2>&1 || runuser -u munge -- munged
    slurmctld -c
    slurmd -c
    for _ in $(seq 60); do
        [ "$(sinfo -h -o %t 2>/dev/null)" = idle ] && { echo "export SLURM_CONF=$SLURM_CONF"; return; }
        sleep 0.5
    done
    sinfo -R >&2 || true
    tail -5 "$folder"/slurmctld.log "$folder"/slurmd.log >&2
    exit 1
}

stop() {
    local daemon process
    scancel --user=root 2>/dev/null || true
    for daemon in slurmd slurmctld; do
        process="$(cat "$folder/$daemon.pid" 2>/dev/null || true)"
        [ -n "$process" ] || continue
        kill "$process" 2>/dev/null || continue
        for _ in $(seq 20); do kill -0 "$process" 2>/dev/null || break; sleep 0.5; done
        kill -9 "$process" 2>/dev/null || true
    done
}

case "$command" in
    install) install_packages ;;
    start) start ;;
    stop) stop ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
