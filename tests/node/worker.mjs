// A worker of the published iii-sdk that does what it is told (lines.mjs).
//
//   {"do":"function","id":F,"returns":V}        registers F; each call reports {"called":F,"data":…}
//   {"do":"trigger","type":T,"function_id":F,"config":C}
//   {"do":"call","tag":N,"function_id":F,"payload":P}   reports {"answer":N,"result":…} or
//                                                       {"answer":N,"error":"CODE: message"}
//   {"do":"void","function_id":F,"payload":P}   calls without asking for an answer
import { registerWorker, TriggerAction } from 'iii-sdk'

import { report, serveCommands } from './lines.mjs'

const worker = registerWorker(process.env.III_URL, { workerName: 'node-worker' })

/** Not awaited by the loop of commands, so that calls overlap as they do in an application. */
async function call({ tag, function_id, payload }) {
  try {
    const result = await worker.trigger({ function_id, payload })
    report({ answer: tag, result: result ?? null })
  } catch (error) {
    report({ answer: tag, error: error.message })
  }
}

function run(command) {
  switch (command.do) {
    case 'function':
      worker.registerFunction(command.id, async (data) => {
        report({ called: command.id, data })
        return command.returns
      })
      return
    case 'trigger': {
      const { type, function_id, config } = command
      worker.registerTrigger({ type, function_id, config })
      return
    }
    case 'call':
      call(command)
      return
    case 'void': {
      const { function_id, payload } = command
      worker.trigger({ function_id, payload, action: TriggerAction.Void() })
      return
    }
    default:
      throw new Error(`unknown command ${command.do}`)
  }
}

await serveCommands(run, () => worker.shutdown())
