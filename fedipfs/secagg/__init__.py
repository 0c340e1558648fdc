"""Secure aggregation: the coordinator learns the sum of all vectors, and of no single one.

Every client adds to its vector (uint32, modulo 2**32) a mask of its own and one mask for each of
its neighbours, which that neighbour subtracts. Its own mask's seed and its mask key are shared
among the neighbours (Shamir), sealed to them, so that the sum can be unmasked whoever drops out:
for a client whose vector came, the neighbours give shares of the seed; for one that dropped out,
of the mask key. Never both: that would unmask a single vector.

    ADVERTISE  everyone signs two fresh public keys
    SHARE      everyone seals shares of its seed and its mask key to its neighbours
    MASKED     everyone sends its masked vector; who is late has dropped out
    CONFIRM    every survivor signs who survived and where their vectors are
    UNMASK     once a quorum has signed the same, everyone gives one share for each neighbour

This is the protocol of Bonawitz et al. 2017 against active adversaries, on a complete graph; above
100 clients by default on a k-regular one (Bell et al. 2020). `Client` and `Server` are its two
sides as state machines: they know neither Flower nor a store. Messages are small; vectors travel
apart, named by CIDs. What a client has answered is in its `Journal` before it leaves.

It does not make the sum private (add noise), does not keep out poisoned updates, and one client
that gives wrong shares can end a round. Whoever reads both the masked vectors and the answers to
UNMASK can compute the sum, as the coordinator does: seal them to it.

    parameters = Parameters.choose(10, values=1_200_000, numbers=("weight",))
    session = Session("run", 1, cohort, parameters)                      # cohort: sorted names

    server = Server(session, party.verify)                               # the coordinator's side
    client = Client(session, name, party.sign, party.verify_own, Floors(), Journal(folder, session))

    server.take(client.advertise())                  roster = server.close_advertise()
    server.take(client.share(roster))                deliveries = server.close_share()
    vector = encode(parameters, update, {"weight": 600}).vector
    server.take(client.mask(deliveries[name], vector, put), vector)
                                                     survivors = server.close_masked()
    server.take(client.confirm(survivors))           request = server.close_confirm()
    server.take(client.unmask(request))              result = server.result()
    decode(parameters, result.total, len(result.record.survivors))
"""

from __future__ import annotations

from fedipfs.secagg.client import Client
from fedipfs.secagg.floors import Floors
from fedipfs.secagg.journal import Journal
from fedipfs.secagg.messages import (
    Advertise,
    Confirm,
    Delivery,
    Masked,
    Request,
    Roster,
    Share,
    Survivors,
    Unmask,
)
from fedipfs.secagg.parameters import Parameters
from fedipfs.secagg.quantize import decode, decode_numbers, encode, encode_numbers
from fedipfs.secagg.record import Record
from fedipfs.secagg.server import Result, Server
from fedipfs.secagg.session import Session

__all__ = [
    "Advertise",
    "Client",
    "Confirm",
    "Delivery",
    "Floors",
    "Journal",
    "Masked",
    "Parameters",
    "Record",
    "Request",
    "Result",
    "Roster",
    "Server",
    "Session",
    "Share",
    "Survivors",
    "Unmask",
    "decode",
    "decode_numbers",
    "encode",
    "encode_numbers",
]
