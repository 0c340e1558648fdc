"""A partner's side: hands messages to the worker that the partner started. No code travels."""

import fedipfs.clients.stub

app = fedipfs.clients.stub.app
