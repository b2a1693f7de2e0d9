// Runs in the browser: the published stream-client-browser and bare WebSockets. The program around
// it (browser.mjs) provides `report` and calls `run`.
import { Stream } from '@motiadev/stream-client-browser'

import { makeClient } from './client_commands.mjs'

let client = null

/** Besides the commands of client_commands.mjs:
 *
 *   {"do":"connect","url":U}                 makes the published client
 *   {"do":"socket","url":U,"protocols":[…]}  opens a bare WebSocket; reports {"open":protocol},
 *                                            {"frame":…} for each message, {"closed":code}
 */
window.run = function run(command) {
  switch (command.do) {
    case 'connect':
      client = makeClient(new Stream(command.url), window.report)
      return
    case 'socket': {
      const socket = new WebSocket(command.url, command.protocols ?? [])
      socket.onopen = () => window.report({ open: socket.protocol })
      socket.onmessage = (message) => window.report({ frame: JSON.parse(message.data) })
      socket.onclose = (event) => window.report({ closed: event.code })
      window.socket = socket
      return
    }
    case 'send':
      window.socket.send(JSON.stringify(command.message))
      return
    default:
      client(command)
  }
}
