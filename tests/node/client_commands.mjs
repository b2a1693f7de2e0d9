// What a published stream client is told to do, in Node and in the browser alike.

/** A client of `Stream` (either package) that answers commands with calls of `report`:
 *
 *   {"do":"group","name":N,"stream":S,"group":G}         changes report {"changed":N,"state":[…]}
 *   {"do":"item","name":N,"stream":S,"group":G,"id":I}   changes report {"changed":N,"state":…}
 *   {"do":"on","name":N,"event":E}         custom events report {"event":E,"name":N,"data":…}
 *   {"do":"close","name":N}                ends the subscription
 */
export function makeClient(stream, report) {
  const subscriptions = new Map()

  function add(name, subscription) {
    subscription.addChangeListener((state) => report({ changed: name, state }))
    subscriptions.set(name, subscription)
  }

  return function run(command) {
    const { name } = command
    switch (command.do) {
      case 'group':
        add(name, stream.subscribeGroup(command.stream, command.group))
        return
      case 'item':
        add(name, stream.subscribeItem(command.stream, command.group, command.id))
        return
      case 'on':
        subscriptions
          .get(name)
          .onEvent(command.event, (data) => report({ event: command.event, name, data }))
        return
      case 'close':
        subscriptions.get(name).close()
        subscriptions.delete(name)
        return
      default:
        throw new Error(`unknown command ${command.do}`)
    }
  }
}
