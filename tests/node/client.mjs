// A client of the published stream-client-node, told what to do by client_commands.mjs.
// Argument: subprotocols to offer, each its own.
import { Stream } from '@motiadev/stream-client-node'

import { makeClient } from './client_commands.mjs'
import { report, serveCommands } from './lines.mjs'

/** The package leaves the socket's 'error' without a listener: a refused connection would end the
 * process, or, where that is caught, never come back. With one it connects again after 2 s. */
class PatientStream extends Stream {
  createSocket() {
    const adapter = super.createSocket()
    adapter.ws.on('error', (error) => report({ refused: error.message }))
    return adapter
  }
}

const protocols = process.argv.slice(2)
const options = protocols.length > 0 ? { protocols } : undefined
const stream = new PatientStream(process.env.STREAM_URL, options)

await serveCommands(makeClient(stream, report), () => process.exit(0))
