// A client of the stream port for browsers (and for Node, with a WebSocket) that neither misses nor
// doubles a change. One file, nothing to build.
//
//   import { Client } from './stream.js'
//
//   const client = new Client('ws://localhost:3112', { token })
//   const watch = client.watch('chat', 'room-1', {
//     onChange: (change) => console.log(change.kind, change.itemId, change.data),
//     onState: (items) => render([...items.values()]),
//   })
//   watch.close()
//   client.close()
//
// It connects, connects again after every loss, and goes on where it was. When the broker no longer
// keeps what was missed, the next change is a `sync`, which has the whole state.

/**
 * What happened to a group or an item.
 *
 * @typedef {object} Change
 * @property {'sync' | 'create' | 'update' | 'delete' | 'event'} kind
 * @property {string | null} itemId whose change it is; null in the sync of a group and in events
 *   that are of no item
 * @property {any} data the new value, the deleted one, or what a custom event carries; in the sync
 *   of a group a Map of item ids to values, in that of an item its value or null
 * @property {number} seq of the change within the group; in a sync that of the last it contains
 * @property {string} epoch the numbering that `seq` belongs to; another one begins with a sync
 * @property {number} timestampMs the broker's; strictly increasing within a group
 * @property {string | null} eventType of a custom event
 */

/**
 * @typedef {object} ClientOptions
 * @property {string | (() => string | Promise<string>)} [token] or what gives one, asked each time
 *   the client connects. Sent as the subprotocols `Authorization, <token>`; one with characters that
 *   those cannot have, as `?token=`, percent-encoded
 * @property {typeof WebSocket} [WebSocket] instead of the global one
 */

/**
 * @typedef {object} WatchOptions
 * @property {string} [item] watch this item instead of the whole group
 * @property {(change: Change) => void} [onChange] called for every change, a sync first
 * @property {(state: any) => void} [onState] called with `Watch.state` after every change of it
 * @property {(error: StreamError) => void} [onError]
 */

const RECONNECT_MS_FIRST = 200
const RECONNECT_MS_MAX = 10_000
/** Codes of `error` events that say that a join will never be answered. */
const REFUSALS = new Set(['invalid_message', 'name_too_long', 'too_many_subscriptions'])
/** What a browser takes as a subprotocol, and a token in its place. */
const SUBPROTOCOL = /^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$/

/** What the broker refuses, or cannot do for now. `final`: the watch has ended. */
export class StreamError extends Error {
  /**
   * @param {string} code
   * @param {string} message
   * @param {boolean} final
   */
  constructor(code, message, final) {
    super(message)
    this.name = 'StreamError'
    this.code = code
    this.final = final
  }
}

/** A connection to the stream port, kept up, and the watches on it. */
export class Client {
  #url
  #token
  #WebSocket
  /** @type {WebSocket | null} */
  #socket = null
  #attempt = 0
  #failures = 0
  #answered = false
  #timer = undefined
  #closed = false
  /** By stream and group, then by item (null: the whole group).
   * @type {Map<string, Map<string | null, Subscription>>} */
  #groups = new Map()

  /**
   * It connects when the first watch is made.
   *
   * @param {string | URL} url of the stream port, `ws://` or `wss://`
   * @param {ClientOptions} [options]
   */
  constructor(url, { token, WebSocket = globalThis.WebSocket } = {}) {
    if (typeof WebSocket !== 'function') throw new TypeError('no WebSocket here: pass one')
    this.#url = new URL(url)
    this.#token = token
    this.#WebSocket = WebSocket
    globalThis.addEventListener?.('online', this.#online)
  }

  /**
   * Watch a group, or one item of it. The callbacks are never called before this returns.
   *
   * @param {string} stream
   * @param {string} groupId
   * @param {WatchOptions} [options]
   * @returns {Watch}
   */
  watch(stream, groupId, options = {}) {
    if (this.#closed) throw new Error('the client is closed')
    const item = options.item ?? null
    const key = keyOf(stream, groupId)
    if (!this.#groups.has(key)) this.#groups.set(key, new Map())
    const subscriptions = this.#groups.get(key)
    let subscription = subscriptions.get(item)
    if (subscription === undefined) {
      subscription = new Subscription(stream, groupId, item)
      subscriptions.set(item, subscription)
      this.#send(subscription.join())
    }
    const watch = new Watch(subscription, options, () => this.#unwatch(watch, subscription))
    subscription.add(watch)
    if (this.#attempt === 0) this.#connect()
    return watch
  }

  /** End every watch and the connection. */
  close() {
    this.#closed = true
    globalThis.removeEventListener?.('online', this.#online)
    clearTimeout(this.#timer)
    for (const subscription of this.#all()) subscription.end()
    this.#groups.clear()
    this.#attempt += 1
    this.#socket?.close(1000)
    this.#socket = null
  }

  /**
   * @param {Watch} watch
   * @param {Subscription} subscription
   */
  #unwatch(watch, subscription) {
    if (!subscription.remove(watch) || subscription.watches.size > 0) return
    this.#forget(subscription)
    this.#send(subscription.leave())
  }

  /** @param {Subscription} subscription */
  #forget({ stream, groupId, item }) {
    const key = keyOf(stream, groupId)
    const subscriptions = this.#groups.get(key)
    subscriptions?.delete(item)
    if (subscriptions?.size === 0) this.#groups.delete(key)
  }

  #all() {
    return [...this.#groups.values()].flatMap((subscriptions) => [...subscriptions.values()])
  }

  /** @param {object} message lost while there is no connection: all is joined with the next one */
  #send(message) {
    if (this.#socket?.readyState === 1) this.#socket.send(JSON.stringify(message))
  }

  // The connection.

  async #connect() {
    this.#attempt += 1
    this.#answered = false
    const attempt = this.#attempt
    const url = new URL(this.#url)
    const protocols = []
    try {
      const token = typeof this.#token === 'function' ? await this.#token() : this.#token
      if (attempt !== this.#attempt) return // closed meanwhile
      const given = token !== undefined && token !== null
      if (given && SUBPROTOCOL.test(token)) protocols.push('Authorization', token)
      else if (given) url.search += `${url.search ? '&' : '?'}token=${encodeURIComponent(token)}`
      this.#open(new this.#WebSocket(url.href, protocols))
    } catch (error) {
      if (attempt !== this.#attempt) return
      this.#tellAll(new StreamError('cannot_connect', String(error), false))
      this.#lost(0)
    }
  }

  /** @param {WebSocket} socket */
  #open(socket) {
    this.#socket = socket
    socket.onopen = () => {
      if (socket !== this.#socket) return
      // Whole groups first: an answer to one makes live ones of its items join again.
      const joined = this.#all().sort((a, b) => Number(a.item !== null) - Number(b.item !== null))
      for (const subscription of joined) this.#send(subscription.join())
    }
    socket.onmessage = ({ data }) => {
      if (socket === this.#socket) this.#receive(JSON.parse(data))
    }
    socket.onerror = () => {} // its close follows
    socket.onclose = ({ code }) => {
      if (socket === this.#socket) this.#lost(code)
    }
  }

  /**
   * Connect again after a wait of anything up to a bound that doubles: clients that a broker lost
   * together come back one by one.
   *
   * @param {number} code of the close
   */
  #lost(code) {
    this.#socket = null
    this.#attempt += 1 // one that is under way is given up
    const unwanted = code >= 4400 && code < 4500
    this.#failures = this.#answered && !unwanted ? 1 : this.#failures + 1
    const bound = Math.min(RECONNECT_MS_MAX, RECONNECT_MS_FIRST * 2 ** (this.#failures - 1))
    this.#timer = setTimeout(() => this.#connect(), Math.random() * bound)
  }

  /** The network is back: a connection from before may be dead and not know it. */
  #online = () => {
    if (this.#attempt === 0) return
    const socket = this.#socket
    clearTimeout(this.#timer)
    this.#failures = 0
    this.#lost(0)
    socket?.close()
  }

  // What comes.

  #receive(frame) {
    if (frame.type !== 'stream') return
    const { event } = frame
    const subscriptions = this.#groups.get(keyOf(frame.streamName, frame.groupId)) ?? new Map()
    const id = frame.id ?? null
    const subscription = subscriptions.get(id)
    switch (event.type) {
      case 'sync':
        this.#sync(subscription, subscriptions, frame)
        break
      case 'resume':
        if (subscription?.resume(frame)) this.#answered = true
        this.#rejoinOthers(subscriptions, frame)
        break
      case 'create':
      case 'update':
      case 'delete':
      case 'event':
        for (const each of new Set([subscriptions.get(null), subscription])) {
          if (each !== undefined && !each.take(frame)) this.#send(each.join())
        }
        break
      case 'unauthorized':
        if (subscription !== undefined) {
          const { stream, groupId } = subscription
          const name = [stream, groupId, ...(id === null ? [] : [id])].join('/')
          this.#refused(subscription, 'unauthorized', `joining ${name} was refused`)
        }
        break
      case 'error':
        this.#error(event)
        break
      default: // added later
    }
  }

  #sync(subscription, subscriptions, frame) {
    this.#rejoinOthers(subscriptions, frame)
    if (subscription === undefined) return
    this.#answered = true
    if (subscription.postponed && frame.resumed === undefined) {
      this.#send(subscription.join()) // the broker forgot the position meanwhile
    } else {
      subscription.sync(frame)
    }
  }

  /**
   * Join again what may have missed events before those that follow this sync or resume. The broker
   * may have dropped an item's events and not have said so yet; the whole group's do not show that
   * one is missing. In another epoch no event shows it. That the answer may be one to a subscription
   * that was left meanwhile makes no difference.
   */
  #rejoinOthers(subscriptions, { id = null, epoch }) {
    for (const [item, other] of subscriptions) {
      if (other.live && item !== id && (id === null || other.epoch !== epoch)) {
        this.#send(other.join())
      }
    }
  }

  #error({ code, message, subscriptionId }) {
    const subscription = this.#all().find((each) => each.id === subscriptionId)
    if (REFUSALS.has(code) && subscription !== undefined) {
      this.#refused(subscription, code, message)
    } else if (subscription !== undefined) {
      // a sync comes when it can
      subscription.postponed = subscription.seq !== null && !subscription.live
      subscription.fail(new StreamError(code, message, false))
    }
  }

  #refused(subscription, code, message) {
    this.#forget(subscription)
    subscription.fail(new StreamError(code, message, true))
    subscription.end()
  }

  #tellAll(error) {
    for (const subscription of this.#all()) subscription.fail(error)
  }
}

/** One watch of a group or an item. Made by `Client.watch`. */
export class Watch {
  #subscription
  #close

  /**
   * @param {Subscription} subscription
   * @param {WatchOptions} options
   * @param {() => void} close
   */
  constructor(subscription, options, close) {
    this.#subscription = subscription
    this.#close = close
    this.options = options
  }

  /**
   * Of a group: a Map of item ids to values, in order of first insertion; only to be read. Of an
   * item: its value, or null.
   */
  get state() {
    return this.#subscription.state
  }

  /** No more callbacks. */
  close() {
    this.#close()
  }
}

/**
 * Of a group or an item, for all its watches: a frame does not say which subscription it is for,
 * only which group and item. It takes an event only if it comes after its position (epoch, seq).
 *
 * Joining (not `live`): a join was sent; events are passed over until the answer comes, because
 * they are those of another subscription to the same group on the same connection. Live: each event
 * of a whole group must have the next `seq`; an item's may be any distance apart.
 */
class Subscription {
  /** @type {Set<Watch>} */
  watches = new Set()
  live = false
  /** Whether an answer to a join as of the position could not be given yet. */
  postponed = false
  epoch = ''
  /** @type {number | null} null: there was no sync yet */
  seq = null
  timestampMs = 0
  /** @type {Set<Watch>} that did not get their first sync yet */
  #fresh = new Set()

  /**
   * @param {string} stream
   * @param {string} groupId
   * @param {string | null} item
   */
  constructor(stream, groupId, item) {
    // the same over all connections; presence and leaves tell clients apart by it
    this.id = randomId()
    this.stream = stream
    this.groupId = groupId
    this.item = item
    this.state = item === null ? new Map() : null
  }

  /** The frame that joins, as of the position if there is one. */
  join() {
    this.live = false
    this.postponed = false
    const ids = this.item === null ? { ids: true } : {}
    const known = this.epoch !== '' && this.seq !== null
    const position = known ? { since: this.seq, epoch: this.epoch } : {}
    return { type: 'join', data: { ...this.#names(), ...ids, ...position } }
  }

  leave() {
    return { type: 'leave', data: this.#names() }
  }

  #names() {
    const names = { subscriptionId: this.id, streamName: this.stream, groupId: this.groupId }
    return this.item === null ? names : { ...names, id: this.item }
  }

  /**
   * One that comes later begins with what is known, once the caller has it.
   *
   * @param {Watch} watch
   */
  add(watch) {
    this.watches.add(watch)
    if (this.seq === null) return
    this.#fresh.add(watch)
    queueMicrotask(() => {
      this.#fresh.delete(watch)
      if (this.watches.has(watch)) this.#tell(watch, this.#localSync())
    })
  }

  /**
   * @param {Watch} watch
   * @returns {boolean} whether it was there
   */
  remove(watch) {
    return this.watches.delete(watch)
  }

  end() {
    this.watches.clear()
  }

  /** @param {StreamError} error */
  fail(error) {
    for (const watch of [...this.watches]) {
      if (this.watches.has(watch)) call(watch.options.onError, error)
    }
  }

  // What frames do.

  sync(frame) {
    this.live = true
    this.epoch = frame.epoch ?? ''
    this.seq = frame.seq ?? 0
    const { data, ids } = frame.event
    this.state = this.item === null ? new Map(itemsOf(data, ids)) : data
    this.timestampMs = frame.timestamp
    this.#deliver(this.#localSync())
  }

  /** False: this answers an earlier join, whose sync came since. */
  resume(frame) {
    if (this.live || this.epoch !== frame.epoch || this.seq !== frame.seq) return false
    this.live = true
    return true
  }

  /** Take an event if it is the next one. False: there is a gap before it. */
  take(frame) {
    if (!this.live) return true
    const { seq } = frame
    if (seq !== undefined) {
      // brokers of other make number nothing
      if (seq <= this.seq) return true
      if (this.item === null && seq !== this.seq + 1) return false
      this.seq = seq
    }
    const kind = frame.event.type
    const id = frame.id ?? null
    const { data, type } = kind === 'event' ? frame.event.event : { ...frame.event, type: null }
    if (kind !== 'event') this.#apply(kind, id, data)
    this.timestampMs = frame.timestamp
    this.#deliver(this.#change(kind, id, data, type))
    return true
  }

  #apply(kind, id, data) {
    if (this.item !== null) this.state = kind === 'delete' ? null : data
    else if (kind === 'delete') this.state.delete(id)
    else this.state.set(id, data)
  }

  /** What the broker would sync as of the position. */
  #localSync() {
    return this.#change('sync', this.item, this.item === null ? new Map(this.state) : this.state)
  }

  /** @returns {Change} */
  #change(kind, itemId, data, eventType = null) {
    const { epoch, timestampMs } = this
    return { kind, itemId, data, seq: this.seq, epoch, timestampMs, eventType }
  }

  #deliver(change) {
    for (const watch of [...this.watches]) {
      if (this.watches.has(watch) && !this.#fresh.has(watch)) this.#tell(watch, change)
    }
  }

  #tell(watch, change) {
    call(watch.options.onChange, change)
    if (change.kind !== 'event' && this.watches.has(watch)) call(watch.options.onState, this.state)
  }
}

/** `crypto.randomUUID` is for pages of https only. */
function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16))
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('')
}

/** @param {string} stream @param {string} groupId */
function keyOf(stream, groupId) {
  return JSON.stringify([stream, groupId])
}

/**
 * The items of a group's sync. Without `ids` those count whose value has its id in it.
 *
 * @param {any[]} values
 * @param {string[] | undefined} ids
 * @returns {[string, any][]}
 */
function itemsOf(values, ids) {
  if (ids?.length === values.length) return ids.map((id, index) => [id, values[index]])
  return values.filter((value) => typeof value?.id === 'string').map((value) => [value.id, value])
}

/** What a callback throws is reported as if nobody was around it; the client goes on. */
function call(callback, argument) {
  try {
    callback?.(argument)
  } catch (error) {
    setTimeout(() => {
      throw error
    })
  }
}
