#!/bin/sh
# Makes a Kubo node one of a federation's alone: docs/ipfs.md says why of each line. Run it as the
# node's user while the daemon is stopped; again does no harm. For Kubo 0.37 and later.
#
# FEDIPFS_NODE=coordinator: the others dial its port 4001. Otherwise the node dials them, and
# listens on loopback alone: at a partner no port is open.
set -eu

[ -e "${IPFS_PATH:-$HOME/.ipfs}/config" ] || ipfs init --empty-repo
ipfs config profile apply autoconf-off
ipfs bootstrap rm --all
ipfs config Routing.Type none
ipfs config --json Discovery.MDNS.Enabled false
ipfs config --json Swarm.DisableNatPortMap true
ipfs config --json Swarm.RelayClient.Enabled false
ipfs config --json Swarm.EnableHolePunching false
ipfs config --json AutoTLS.Enabled false
ipfs config --json Addresses.Gateway '[]'
ipfs config Addresses.API /ip4/127.0.0.1/tcp/5001
ipfs config Datastore.StorageMax "${FEDIPFS_STORAGE:-200GB}"
if [ "${FEDIPFS_NODE:-}" = coordinator ]; then
  ipfs config --json Addresses.Swarm '["/ip4/0.0.0.0/tcp/4001", "/ip4/0.0.0.0/udp/4001/quic-v1"]'
else
  ipfs config --json Addresses.Swarm '["/ip4/127.0.0.1/tcp/4001"]'
fi
