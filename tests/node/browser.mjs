// Chromium with one page, told what to do (lines.mjs). Reports {"origin":…} when it runs: the
// address that its page comes from. Argument: a folder whose files are served besides that page.
//
//   {"do":"goto","path":P}                shows the page at P of the origin, reports {"shown":P}
//   {"do":"texts","tag":N,"selector":C}   reports {"answer":N,"result":[text of each match]}
//   {"do":"screenshot","file":F}          writes a PNG, reports {"screenshot":F}
//   {"do":"leave"}                        closes the tab
//   others                                go to page.mjs
import { readFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import { basename, join } from 'node:path'
import { fileURLToPath } from 'node:url'

import { build } from 'esbuild'
import { chromium } from 'playwright-core'

import { report, serveCommands } from './lines.mjs'

const folder = process.argv[2]
const bundle = await build({
  entryPoints: [fileURLToPath(new URL('page.mjs', import.meta.url))],
  bundle: true,
  format: 'iife',
  write: false,
})
const script = bundle.outputFiles[0].text

/** The page at "/", its script, and the files of the folder, no deeper. */
async function answer(request, response) {
  const { pathname } = new URL(request.url, 'http://page')
  if (pathname === '/') {
    response.setHeader('content-type', 'text/html; charset=utf-8')
    response.end('<!doctype html><title>client</title><script src="/client.js"></script>')
  } else if (pathname === '/client.js') {
    response.setHeader('content-type', 'text/javascript; charset=utf-8')
    response.end(script)
  } else {
    try {
      const content = await readFile(join(folder, basename(pathname)))
      response.setHeader('content-type', 'text/html; charset=utf-8')
      response.end(content)
    } catch {
      response.statusCode = 404
      response.end()
    }
  }
}

const server = createServer(answer)
await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
const origin = `http://127.0.0.1:${server.address().port}`

const browser = await chromium.launch({
  executablePath: '/usr/bin/chromium',
  headless: true,
  args: [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
  ],
})
const page = await browser.newPage()
page.on('pageerror', (error) => report({ page_error: error.message }))
page.on('console', (message) => {
  if (message.type() === 'error') report({ console_error: message.text() })
})
await page.exposeFunction('report', report)
await page.goto(`${origin}/`)
report({ origin })

async function run(command) {
  switch (command.do) {
    case 'goto':
      await page.goto(`${origin}${command.path}`)
      report({ shown: command.path })
      return
    case 'texts':
      report({ answer: command.tag, result: await page.locator(command.selector).allTextContents() })
      return
    case 'screenshot':
      await page.screenshot({ path: command.file })
      report({ screenshot: command.file })
      return
    case 'leave':
      await page.close()
      return
    default:
      await page.evaluate((forwarded) => window.run(forwarded), command)
  }
}

await serveCommands(run, async () => {
  await browser.close()
  server.close()
})
