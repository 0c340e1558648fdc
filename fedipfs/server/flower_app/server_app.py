"""The coordinator's side: the package that is installed there."""

import fedipfs.server.deployed

app = fedipfs.server.deployed.app
