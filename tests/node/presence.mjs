// Presence, with the published iii-sdk: who joins a group of the stream "chat" is an item of the
// same group of the stream "presence" until the subscription ends.
import { registerWorker } from 'iii-sdk'

import { report, serveCommands } from './lines.mjs'

const worker = registerWorker(process.env.III_URL, { workerName: 'node-presence' })

worker.registerFunction('presence::join', async ({ stream_name, group_id, subscription_id }) => {
  if (stream_name === 'chat') {
    await worker.trigger({
      function_id: 'stream::set',
      payload: {
        stream_name: 'presence',
        group_id,
        item_id: subscription_id,
        data: { id: subscription_id, status: 'online' },
      },
    })
  }
  return { unauthorized: false }
})
worker.registerFunction('presence::leave', async ({ stream_name, group_id, subscription_id }) => {
  if (stream_name === 'chat') {
    await worker.trigger({
      function_id: 'stream::delete',
      payload: { stream_name: 'presence', group_id, item_id: subscription_id },
    })
  }
})
worker.registerTrigger({ type: 'stream:join', function_id: 'presence::join', config: {} })
worker.registerTrigger({ type: 'stream:leave', function_id: 'presence::leave', config: {} })

// Registrations are not answered; what is sent after them is.
await worker.trigger({ function_id: 'stream::list_all', payload: {} })
report({ ready: true })

await serveCommands(
  () => {},
  () => worker.shutdown(),
)
