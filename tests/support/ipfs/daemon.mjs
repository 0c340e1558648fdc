// A js-ipfs daemon for tests: RPC on 127.0.0.1 only, offline, no swarm, no bootstrap, no mDNS.
//
//   node daemon.mjs PACKAGES REPO PORT
//
// PACKAGES is the folder that holds node_modules. Port 0 takes a free one. Prints one line,
// `ready PORT`, when it serves. Ends on SIGTERM and SIGINT, and when its stdin is closed, so that
// it does not outlive the tests.
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'

const [packages, repo, port] = process.argv.slice(2)
console.log = console.error // stdout is for the line that the harness waits for

// A dependency uses it before Node 22 has it: define it before that is imported.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new this((...functions) => { [resolve, reject] = functions })
  return { promise, resolve, reject }
}

// Node looks for packages next to this file only; they are in a folder of their own.
const load = path => import(pathToFileURL(join(packages, 'node_modules', path)))
const { create } = await load('ipfs-core/src/index.js')
const { HttpApi } = await load('ipfs-http-server/src/index.js')

// js-ipfs refuses a block/put whose whole request exceeds 1 MiB, so also a full leaf of 1 MiB.
// Take what Kubo takes: blocks of 2 MiB.
const { putResource } = await load('ipfs-http-server/src/api/resources/block.js')
putResource.options.payload.maxBytes = (2 << 20) + (1 << 10)

let ipfs, api
let stopping = false
async function stop () {
  if (stopping) return
  stopping = true
  try {
    await api?.stop()
    await ipfs?.stop()
  } finally {
    process.exit(0)
  }
}
process.on('SIGTERM', stop)
process.on('SIGINT', stop)
process.stdin.on('end', stop).resume()

ipfs = await create({
  repo,
  offline: true,
  silent: true,
  init: { algorithm: 'Ed25519', emptyRepo: true },
  config: {
    Addresses: { Swarm: [], API: `/ip4/127.0.0.1/tcp/${port}`, Gateway: '', Delegates: [] },
    Bootstrap: [],
    Discovery: { MDNS: { Enabled: false }, webRTCStar: { Enabled: false } }
  }
})
api = new HttpApi(ipfs)
await api.start()
process.stdout.write(`ready ${api._apiServers[0].info.port}\n`)
