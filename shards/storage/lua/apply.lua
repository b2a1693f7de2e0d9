-- Performs operations on groups, one after the other: stores, numbers, stamps, keeps the history and
-- publishes. Nothing of a group is seen half done.
--
-- KEYS: of each group its data, head, order and history.
-- ARGV: the wall clock in ms; the history's limits (events, ms, bytes); the bytes of values that one
-- answer may hold; ms after which an empty group is forgotten; an epoch for groups that have none;
-- the command that tells other brokers; what the name of the original's channel begins with, and
-- those of channels for brokers; 1 if the original's channel is served; then for each group its names
-- as JSON members, the channel of its changes, an epoch and the last number in it that was told (''
-- and 0 if none is known), how many operations, how many arguments these have, and they, each as its
-- name and its own arguments.
--
-- Returns a text and values, few and large, as clients spend their time on each. The text has for
-- each group: 0, 1 if it began, and for each operation that was performed 0, done; 1, there is
-- nothing to change; 2, too large, and the bytes; 3, the item is not what was expected: it and all
-- that follow on the group were not performed; 4, refused, the value says why. The first value of a
-- group is its epoch. Or, when a group can't be touched: 1; values are the key, and its type or an
-- error.

local at = 0
local function take()
    at = at + 1
    return ARGV[at]
end
local function take_number()
    return tonumber(take())
end
local now, events_max, age_ms_max = take_number(), take_number(), take_number()
local bytes_max, answer_bytes_max, idle_ms = take_number(), take_number(), take_number()
local new_epoch, publish, prefix = take(), take(), take()
local channel_prefix, serves_others = take(), take() == '1'
local numbers, answer = {}, { '' }

local EVENTS = prefix .. 'stream::events'
local LISTENERS = prefix .. 'broker:listeners' -- all brokers that hear what others say there
local NUMBERED_MAX = 100000 -- items of other writers that get a place at the first touch
local AT_ONCE = 1000 -- arguments of one command
local ENVELOPE_MIN = 100 -- bytes that an envelope has at least beside its data
local CHANGE_OVERHEAD = 200 -- what a kept change counts beside its data
local TOLD_BYTES = 1048576 -- of one message to other brokers, about
local SEPARATOR = '\30' -- which no JSON text holds

-- Of the group that is at work.
local data, head, order, history, names, channel
local epoch, seq, time, number, bytes, expires, count
local is_new, began_empty, began, numbered_more, is_read
local first_seq, first_time, told, told_bytes, unkept, unkept_bytes

local function failed(reply)
    return type(reply) == 'table' and reply.err
end

local function text_of(value)
    return string.format('%d', value)
end

local function say(value)
    numbers[#numbers + 1] = text_of(value)
end

local function give(value)
    answer[#answer + 1] = value
end

local function refuse(reply)
    say(4)
    give(reply.err)
end

-- What a command on `key` answers; the group can't be touched when it fails.
local function ask(key, reply)
    if failed(reply) then
        error({ key, reply.err })
    end
    return reply
end

local function text_at(item)
    return ask(data, redis.pcall('HGET', data, item))
end

-- How many items there are, asked once: whatever an operation asks first makes sure that the key
-- can be touched.
local function counted()
    if not count then
        count = ask(data, redis.pcall('HLEN', data))
        began_empty = count == 0
    end
    return count
end

-- Of a change: its number and time, and what the item held.
local function changed(old)
    say(0)
    say(seq)
    say(time)
    give(old)
end

local function tick()
    time = math.max(now, time + 1)
    return time
end

-- Give the items that others wrote their places before the first of our own.
local function number_existing()
    if not is_new then
        return
    end
    is_new = false
    redis.pcall('DEL', history)
    local last = redis.pcall('ZRANGE', order, -1, -1, 'WITHSCORES')
    number = not failed(last) and tonumber(last[2]) or 0
    numbered_more = true
    if counted() == 0 or count > NUMBERED_MAX then
        return
    end
    local added = { 'NX' }
    for _, item in ipairs(redis.call('HKEYS', data)) do
        number = number + 1
        added[#added + 1] = text_of(number)
        added[#added + 1] = item
        if #added > 2 * AT_ONCE then
            redis.pcall('ZADD', order, unpack(added))
            added = { 'NX' }
        end
    end
    if #added > 1 then
        redis.pcall('ZADD', order, unpack(added))
    end
end

-- Keep what was told, up to the limits.
local function keep_told()
    local added, added_bytes = unkept, unkept_bytes
    if #added == 0 then
        return
    end
    unkept, unkept_bytes = {}, 0
    local length
    for first = 1, #added, AT_ONCE do
        local last = math.min(first + AT_ONCE - 1, #added)
        length = redis.pcall('RPUSH', history, unpack(added, first, last))
        if failed(length) then
            return
        end
    end
    local was_empty = length == #added
    bytes = (was_empty and 0 or bytes) + added_bytes
    local excess = math.min(length - events_max, length - 1)
    if excess == 1 then
        bytes = bytes - #redis.call('LPOP', history)
    elseif excess > 1 then
        for _, envelope in ipairs(redis.call('LRANGE', history, 0, excess - 1)) do
            bytes = bytes - #envelope
        end
        redis.call('LTRIM', history, text_of(excess), -1)
    end
    length = length - math.max(excess, 0)
    while length > 1 and bytes > bytes_max do
        bytes = bytes - #redis.call('LPOP', history)
        length = length - 1
    end
    if was_empty or now + age_ms_max > expires then -- seldom: it is only cleaned up
        local lifetime = age_ms_max + math.floor(age_ms_max / 8) + 1
        expires = now + lifetime
        redis.pcall('PEXPIRE', history, text_of(lifetime))
        redis.pcall('HSET', head, 'expires', text_of(expires))
    end
end

-- It is stored, whatever becomes of the message.
local function tell_brokers()
    if #told > 0 then
        local envelopes = table.concat(told, SEPARATOR)
        redis.pcall(publish, channel, epoch .. ' ' .. envelopes)
        -- For those with triggers on the stream. Names in a channel have no colon.
        local stream, group = string.match(channel, ':([^:]*):([^:]*)$')
        redis.pcall('PUBLISH', channel_prefix .. 'changes:' .. stream,
            epoch .. ':' .. text_of(seq) .. ':' .. group .. ':' .. envelopes)
        told, told_bytes = {}, 0
    end
end

local has_listeners
-- Whether somebody besides brokers may listen on the original's channel.
local function others_listen()
    if has_listeners == nil then
        local channels = redis.pcall('PUBSUB', 'NUMSUB', EVENTS, LISTENERS)
        local patterns = redis.pcall('PUBSUB', 'NUMPAT')
        has_listeners = failed(channels) or failed(patterns)
            or channels[2] > channels[4] or patterns > 0
    end
    return has_listeners
end

local function tell(kind, id, value, event_type)
    seq = seq + 1
    local event = kind .. '","data":' .. value .. '}}'
    if event_type and event_type ~= '' then
        event = 'event","event":{"type":' .. event_type .. ',"data":' .. value .. '}}}'
    end
    local first = '{"type":"stream","timestamp":' .. text_of(tick()) .. ',' .. names
        .. ',"id":' .. id .. ',"seq":' .. text_of(seq)
    event = ',"event":{"type":"' .. event
    local envelope = first .. event
    told[#told + 1] = envelope
    told_bytes = told_bytes + #envelope
    if told_bytes > TOLD_BYTES then
        tell_brokers()
    end
    if serves_others and others_listen() then
        redis.pcall('PUBLISH', EVENTS, first .. ',"epoch":"' .. epoch .. '"' .. event)
    end
    if #envelope > bytes_max then
        unkept, unkept_bytes = {}, 0
        redis.pcall('DEL', history)
    elseif events_max > 0 then
        unkept[#unkept + 1] = envelope
        unkept_bytes = unkept_bytes + #envelope
    end
    is_read = false
end

local function put(item, id, value, old)
    number_existing()
    local reply = redis.pcall('HSET', data, item, value)
    if failed(reply) then
        return refuse(reply)
    end
    local kind = 'update'
    if not old then
        kind = 'create'
        if count then
            count = count + 1
        else
            count = redis.call('HLEN', data)
            began_empty = count == 1
        end
        if count == 1 then
            began = true
            redis.pcall('DEL', order) -- of items that others deleted
        end
        number = number + 1
        numbered_more = true
        redis.pcall('ZADD', order, text_of(number), item)
    end
    tell(kind, id, value)
    changed(old)
end

-- Gives the items and their order; true where they are those of the answer before. Returns false
-- when they are too large.
local function give_items()
    if is_read then
        give(true)
        give(true)
        return true
    end
    local found = ask(data, redis.pcall('HGETALL', data))
    local total = 0
    for index = 2, #found, 2 do
        total = total + #found[index] + 1
    end
    if total > answer_bytes_max then
        say(2)
        say(total)
        return false
    end
    is_read = true
    local places = redis.pcall('ZRANGE', order, 0, -1)
    give(found)
    give(failed(places) and {} or places)
    return true
end

-- The envelopes after `since`, or nil where they are not all kept.
local function missed(since)
    local wanted = seq - since
    if wanted < 0 or wanted > events_max then
        return nil
    end
    if wanted == 0 then
        return {}
    end
    keep_told()
    local found = redis.pcall('LRANGE', history, -wanted, -1)
    if failed(found) or #found ~= wanted then
        return nil
    end
    local size = 0
    for _, envelope in ipairs(found) do
        size = size + #envelope - ENVELOPE_MIN + CHANGE_OVERHEAD
    end
    local first = tonumber(string.match(found[1], '"timestamp":(%d+)') or 0)
    local first_kept = tonumber(string.match(found[1], '"seq":(%d+)') or 0)
    local last_kept = tonumber(string.match(found[wanted], '"seq":(%d+)') or 0)
    if size > bytes_max or first < time - age_ms_max then
        return nil
    end
    if first_kept ~= since + 1 or last_kept ~= seq then
        return nil
    end
    return found
end

local perform = {}

function perform.set()
    local item, id, value = take(), take(), take()
    put(item, id, value, text_at(item))
end

-- As `set`, if the item is what the caller made the new value of; '' for a missing one.
function perform.swap()
    local item, id, value, expected = take(), take(), take(), take()
    local old = text_at(item)
    if (old or '') ~= expected then
        say(3)
        return true
    end
    put(item, id, value, old)
end

function perform.check()
    local item, expected = take(), take()
    if (text_at(item) or '') ~= expected then
        say(3)
        return true
    end
    say(0)
end

function perform.delete()
    local item, id = take(), take()
    local old = text_at(item)
    if not old then
        return say(1)
    end
    number_existing()
    local reply = redis.pcall('HDEL', data, item)
    if failed(reply) then
        return refuse(reply)
    end
    if count then
        count = count - 1
    else
        count = redis.call('HLEN', data)
        began_empty = false
    end
    redis.pcall('ZREM', order, item)
    tell('delete', id, pcall(cjson.decode, old) and old or 'null')
    changed(old)
end

function perform.tell()
    local kind, id, value, event_type = take(), take(), take(), take()
    counted()
    number_existing()
    local reply = redis.pcall('HSET', head, 'epoch', epoch) -- refused before anything is told
    if failed(reply) then
        return refuse(reply)
    end
    tell(kind, id, value, event_type)
    changed(false)
end

function perform.get()
    local text = text_at(take())
    say(0)
    give(text)
end

function perform.list()
    if give_items() then
        say(0)
    end
end

-- `scope` says what the snapshot is of: `group`, `item`, or nothing that is stored here.
function perform.join()
    local scope, item, since, since_epoch = take(), take(), take(), take()
    counted()
    number_existing()
    tick()
    local past = since ~= '' and since_epoch == epoch and missed(tonumber(since))
    if past then
        scope = 'nothing'
    end
    if scope == 'group' then
        if not give_items() then
            return
        end
    else
        give(scope == 'item' and text_at(item))
        give(false)
    end
    give(past or false)
    say(0)
    say(seq)
    say(time)
end

function perform.history()
    keep_told()
    local found = redis.pcall('LRANGE', history, 0, -1)
    say(0)
    say(seq)
    give(failed(found) and {} or found)
end

local function read_head(known_epoch, known_seq)
    local known = ask(head,
        redis.pcall('HMGET', head, 'epoch', 'seq', 'time', 'order', 'bytes', 'expires'))
    epoch, seq, time = known[1], tonumber(known[2]) or 0, tonumber(known[3]) or 0
    number, bytes = tonumber(known[4]) or 0, tonumber(known[5]) or 0
    expires = tonumber(known[6]) or 0
    is_new = not epoch
    first_seq, first_time = seq, time
    if is_new then
        epoch, seq = new_epoch, 0
    elseif epoch == known_epoch and seq < known_seq then
        -- Redis lost changes that were told, in a failover or a crash. No number is given twice,
        -- and the one that is left out shows everybody that they have to look anew.
        epoch, seq, first_seq = new_epoch, known_seq + 1, 0
        time = time + 1
        redis.pcall('DEL', history)
    end
end

local function write_head()
    keep_told()
    tell_brokers()
    if time == first_time then
        return
    end
    local changes = { 'seq', text_of(seq), 'time', text_of(time), 'bytes', text_of(bytes) }
    if numbered_more then
        changes[#changes + 1] = 'order'
        changes[#changes + 1] = text_of(number)
    end
    if first_seq == 0 then
        changes[#changes + 1] = 'epoch'
        changes[#changes + 1] = epoch
    end
    redis.pcall('HSET', head, unpack(changes))
    if count == 0 then
        redis.pcall('PEXPIRE', head, text_of(idle_ms))
    elseif began_empty then
        redis.pcall('PERSIST', head)
    end
end

-- The operations of a group, up to one that ends it.
local function perform_all(operations, known_epoch, known_seq)
    read_head(known_epoch, known_seq)
    for _ = 1, operations do
        if perform[take()]() then
            return
        end
    end
end

for place = 0, #KEYS / 4 - 1 do
    data, head, order, history = unpack(KEYS, place * 4 + 1, place * 4 + 4)
    names, channel = take(), take()
    local known_epoch, known_seq = take(), take_number()
    local operations, next_at = take_number(), take_number()
    next_at = at + next_at
    epoch, time, first_time, count, began_empty, began = nil, 0, 0, nil, nil, false
    numbered_more, is_read = false, false
    told, told_bytes, unkept, unkept_bytes = {}, 0, {}, 0
    say(0)
    local said, given = #numbers, #answer
    give('')
    numbers[said + 1] = '0'
    local done, why = pcall(perform_all, operations, known_epoch, known_seq)
    if epoch then
        write_head() -- also of what was done before something failed
    end
    if done then
        answer[given + 1] = epoch
        numbers[said + 1] = began and '1' or '0'
    else
        for index = #numbers, said, -1 do
            numbers[index] = nil
        end
        for index = #answer, given + 1, -1 do
            answer[index] = nil
        end
        say(1)
        if type(why) ~= 'table' or not why[1] then
            why = { data, type(why) == 'table' and why.err or tostring(why) }
        end
        give(why[1])
        give(string.sub(why[2], 1, 9) == 'WRONGTYPE' and redis.call('TYPE', why[1]).ok or why[2])
    end
    at = next_at
end
answer[1] = table.concat(numbers, ' ')
return answer
