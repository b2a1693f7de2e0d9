// A page's module that watches with gateway/static/stream.js. The program around it (browser.mjs)
// provides `report` and calls `run`; `stream.js` is served from the same address as this.
//
//   {"do":"connect","url":U,"token":T}                   makes the client
//   {"do":"watch","name":N,"stream":S,"group":G,"item":I}  begins; reports {"begun":N} with the
//                                        first change, {"error":code,"name":N,"final":…}
//   {"do":"until","name":N,"last":V}     reports {"ended":N,"changes":[…],"state":[[id,value],…]}
//                                        once the watched state has V: of a group as an item's id
//   {"do":"close","name":N}              ends a watch
//   {"do":"end"}                         ends the client
import { Client } from './stream.js'

let client = null
const watched = new Map()

/** Whether the state of a watch is the last one that is waited for. */
function isLast({ watch }, last) {
  return watch.state instanceof Map ? watch.state.has(last) : watch.state === last
}

function reportIfLast(name) {
  const each = watched.get(name)
  if (each.last === undefined || !isLast(each, each.last)) return
  const state = each.watch.state instanceof Map ? [...each.watch.state] : each.watch.state
  window.report({ ended: name, changes: each.changes, state, states: each.states })
  each.last = undefined
}

function watch({ name, stream, group, item }) {
  const each = { changes: [], states: 0, last: undefined, watch: null }
  watched.set(name, each)
  each.watch = client.watch(stream, group, {
    item,
    onChange(change) {
      if (each.changes.length === 0) window.report({ begun: name })
      const data = change.data instanceof Map ? [...change.data] : change.data
      each.changes.push({ ...change, data })
    },
    onState() {
      each.states += 1
      reportIfLast(name)
    },
    onError(error) {
      window.report({ error: error.code, name, final: error.final })
    },
  })
}

window.run = function run(command) {
  switch (command.do) {
    case 'connect':
      client = new Client(command.url, { token: command.token })
      return
    case 'watch':
      watch(command)
      return
    case 'until':
      watched.get(command.name).last = command.last
      reportIfLast(command.name)
      return
    case 'close':
      watched.get(command.name).watch.close()
      return
    case 'end':
      client.close()
      return
    default:
      throw new Error(`unknown command ${command.do}`)
  }
}
