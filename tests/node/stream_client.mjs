// gateway/static/stream.js on sockets and clocks that are not real: what it does with each frame,
// one command and one answer a line (lines.mjs).
//
//   {"do":"begin"}                         makes a client
//   {"do":"connect"}                       the connection that it wants opens
//   {"do":"disconnect"}                    it ends
//   {"do":"receive","frame":F}             a frame comes
//   {"do":"watch","name":N,"stream":S,"group":G,"item":I}
//   {"do":"unwatch","name":N}
//
// Each answer is {"sent":[frame, …],"told":[{"name":N,"change":…,"state":…}, …]}, what came of it;
// Maps are lists of pairs.
import { report, serveCommands } from './lines.mjs'

let socket = null
let timers = []
let sent = []
let told = []
let watches = new Map()
let client = null

globalThis.setTimeout = (callback) => timers.push(callback)
globalThis.clearTimeout = () => {}

class Socket {
  readyState = 0

  constructor() {
    socket = this
  }

  send(text) {
    sent.push(JSON.parse(text))
  }

  close() {}
}

const { Client } = await import('../../gateway/static/stream.js')

/** Everything that was promised is done. */
const settled = () => new Promise((resolve) => setImmediate(resolve))

const plain = (value) => (value instanceof Map ? [...value] : value)

function watch({ name, stream, group, item }) {
  const onChange = (change) => {
    const state = plain(watches.get(name).state)
    told.push({ name, change: { ...change, data: plain(change.data) }, state })
  }
  watches.set(name, client.watch(stream, group, { item, onChange }))
}

async function run(command) {
  switch (command.do) {
    case 'begin':
      timers = []
      watches = new Map()
      socket = null
      client = new Client('ws://nowhere', { WebSocket: Socket })
      break
    case 'connect':
      for (const callback of timers.splice(0)) callback()
      await settled()
      socket.readyState = 1
      socket.onopen()
      break
    case 'disconnect':
      socket.readyState = 3
      socket.onclose({ code: 1006 })
      break
    case 'receive':
      socket.onmessage({ data: JSON.stringify(command.frame) })
      break
    case 'watch':
      watch(command)
      break
    case 'unwatch':
      watches.get(command.name).close()
      watches.delete(command.name)
      break
    default:
      throw new Error(`unknown command ${command.do}`)
  }
  await settled()
  report({ sent, told })
  sent = []
  told = []
}

await serveCommands(run, () => {})
