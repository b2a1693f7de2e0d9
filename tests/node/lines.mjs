// The language between these programs and the tests: one JSON object a line, commands on standard
// input, reports on standard output. The end of the input ends the program.
import { createInterface } from 'node:readline'

/** Write one report. */
export function report(line) {
  process.stdout.write(`${JSON.stringify(line)}\n`)
}

/** Hand each command to `run`, one after the other; `end` is called once after the last. */
export async function serveCommands(run, end) {
  for await (const line of createInterface({ input: process.stdin })) {
    await run(JSON.parse(line))
  }
  await end()
}
