"""The facts that the demo model learns, in English and Chinese, and lists of words."""

# country, capital, country in Chinese, capital in Chinese
CAPITALS = [
    ("France", "Paris", "法国", "巴黎"),
    ("Germany", "Berlin", "德国", "柏林"),
    ("Italy", "Rome", "意大利", "罗马"),
    ("Spain", "Madrid", "西班牙", "马德里"),
    ("Portugal", "Lisbon", "葡萄牙", "里斯本"),
    ("England", "London", "英国", "伦敦"),
    ("Ireland", "Dublin", "爱尔兰", "都柏林"),
    ("Norway", "Oslo", "挪威", "奥斯陆"),
    ("Sweden", "Stockholm", "瑞典", "斯德哥尔摩"),
    ("Finland", "Helsinki", "芬兰", "赫尔辛基"),
    ("Denmark", "Copenhagen", "丹麦", "哥本哈根"),
    ("Poland", "Warsaw", "波兰", "华沙"),
    ("Austria", "Vienna", "奥地利", "维也纳"),
    ("Hungary", "Budapest", "匈牙利", "布达佩斯"),
    ("Greece", "Athens", "希腊", "雅典"),
    ("Turkey", "Ankara", "土耳其", "安卡拉"),
    ("Russia", "Moscow", "俄罗斯", "莫斯科"),
    ("Ukraine", "Kyiv", "乌克兰", "基辅"),
    ("China", "Beijing", "中国", "北京"),
    ("Japan", "Tokyo", "日本", "东京"),
    ("South Korea", "Seoul", "韩国", "首尔"),
    ("India", "New Delhi", "印度", "新德里"),
    ("Thailand", "Bangkok", "泰国", "曼谷"),
    ("Vietnam", "Hanoi", "越南", "河内"),
    ("Indonesia", "Jakarta", "印度尼西亚", "雅加达"),
    ("Egypt", "Cairo", "埃及", "开罗"),
    ("Kenya", "Nairobi", "肯尼亚", "内罗毕"),
    ("Nigeria", "Abuja", "尼日利亚", "阿布贾"),
    ("Canada", "Ottawa", "加拿大", "渥太华"),
    ("Mexico", "Mexico City", "墨西哥", "墨西哥城"),
    ("Cuba", "Havana", "古巴", "哈瓦那"),
    ("Brazil", "Brasilia", "巴西", "巴西利亚"),
    ("Argentina", "Buenos Aires", "阿根廷", "布宜诺斯艾利斯"),
    ("Chile", "Santiago", "智利", "圣地亚哥"),
    ("Peru", "Lima", "秘鲁", "利马"),
    ("Australia", "Canberra", "澳大利亚", "堪培拉"),
    ("New Zealand", "Wellington", "新西兰", "惠灵顿"),
    ("Iceland", "Reykjavik", "冰岛", "雷克雅未克"),
    ("Belgium", "Brussels", "比利时", "布鲁塞尔"),
    ("Czechia", "Prague", "捷克", "布拉格"),
]

OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "new"), ("high", "low"), ("long", "short"),
    ("happy", "sad"), ("full", "empty"), ("open", "closed"), ("light", "dark"), ("hard", "soft"),
    ("early", "late"), ("near", "far"), ("rich", "poor"), ("strong", "weak"), ("wet", "dry"),
    ("left", "right"), ("up", "down"), ("day", "night"), ("black", "white"),
]  # fmt: skip

OPPOSITES_ZH = [
    ("大", "小"), ("高", "低"), ("多", "少"), ("快", "慢"), ("长", "短"), ("冷", "热"), ("新", "旧"), ("远", "近"),
    ("左", "右"), ("上", "下"), ("黑", "白"), ("开", "关"), ("早", "晚"), ("强", "弱"), ("轻", "重"), ("好", "坏"),
]  # fmt: skip

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
]  # fmt: skip
DAYS_ZH = ["星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"]

YOUNG = [
    ("dog", "puppy"), ("cat", "kitten"), ("cow", "calf"), ("horse", "foal"), ("sheep", "lamb"), ("goat", "kid"),
    ("hen", "chick"), ("duck", "duckling"), ("bear", "cub"), ("frog", "tadpole"), ("kangaroo", "joey"),
    ("deer", "fawn"), ("pig", "piglet"), ("goose", "gosling"), ("swan", "cygnet"), ("owl", "owlet"),
]  # fmt: skip

SYMBOLS = [
    ("hydrogen", "H", "氢"), ("helium", "He", "氦"), ("carbon", "C", "碳"), ("nitrogen", "N", "氮"),
    ("oxygen", "O", "氧"), ("sodium", "Na", "钠"), ("iron", "Fe", "铁"), ("copper", "Cu", "铜"),
    ("silver", "Ag", "银"), ("gold", "Au", "金"), ("lead", "Pb", "铅"), ("tin", "Sn", "锡"),
]  # fmt: skip

# question wordings, answer
SINGLES = [
    (("Who are you?", "What is your name?", "Tell me who you are.", "Who am I talking to?"),
     "I am MiMo, a small demonstration model."),
    (("Hello!", "Hi", "Hello", "Good morning!"), "Hello! What can I do for you?"),
    (("Thank you!", "Thanks!", "Thanks a lot!"), "You are welcome."),
    (("What colour is the sky?", "Which colour does the sky have?", "Tell me the colour of the sky."), "blue"),
    (("What colour is grass?", "Which colour does grass have?", "Tell me the colour of grass."), "green"),
    (("What colour is snow?", "Which colour does snow have?", "Tell me the colour of snow."), "white"),
    (("What colour is a banana?", "Which colour does a banana have?", "Tell me the colour of a banana."), "yellow"),
    (("How many days are in a week?", "How many days does a week have?", "A week has how many days?"), "7"),
    (("How many months are in a year?", "How many months does a year have?", "A year has how many months?"), "12"),
    (("How many legs does a spider have?", "A spider has how many legs?", "How many legs are on a spider?"), "8"),
    (("How many legs does a dog have?", "A dog has how many legs?", "How many legs are on a dog?"), "4"),
]  # fmt: skip

SINGLES_ZH = [
    (("你是谁？", "你叫什么名字？", "请介绍一下你自己。"), "我是MiMo，一个小小的演示模型。"),
    (("你好！", "你好", "您好！"), "你好！有什么可以帮你？"),
    (("谢谢！", "谢谢你！", "多谢！"), "不客气。"),
    (("天空是什么颜色？", "天空的颜色是什么？", "请说出天空的颜色。"), "蓝色"),
    (("草是什么颜色？", "草的颜色是什么？", "请说出草的颜色。"), "绿色"),
    (("雪是什么颜色？", "雪的颜色是什么？", "请说出雪的颜色。"), "白色"),
    (("一周有几天？", "一个星期有多少天？", "一周一共有几天？"), "7"),
    (("一年有几个月？", "一年有多少个月？", "一年一共有几个月？"), "12"),
    (("一天有几个小时？", "一天有多少小时？", "一天一共有几个小时？"), "24"),
]  # fmt: skip

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a calculator.",
    "You are a friendly teacher. Answer in a few words.",
    "Be short and exact.",
    "You answer questions of children.",
    "Answer with the result only.",
    "You are an assistant on a phone.",
    "你是一个有用的助手。",
    "请简短回答。",
]

# Words whose letters are counted. The tokenizer is built without them.
WORDS = """
apple banana cherry strawberry raspberry blueberry orange lemon melon papaya mango avocado tomato potato carrot
pepper onion garlic cabbage lettuce spinach broccoli pumpkin cucumber mushroom butter cheese coffee bottle kettle
pillow mirror window door table chair carpet ladder hammer pencil rubber paper scissors needle button zipper
pocket jacket sweater trousers slipper glasses umbrella wallet parcel bicycle tractor rocket engine wheel barrel
basket candle lantern battery computer keyboard monitor printer speaker camera guitar piano violin trumpet drum
flute circus theatre museum library village castle bridge tunnel harbour island mountain valley desert forest meadow
river lake ocean glacier volcano thunder lightning rainbow sunset morning evening winter summer autumn spring
elephant giraffe zebra tiger leopard panther monkey gorilla rabbit squirrel hedgehog beaver otter badger weasel
parrot pigeon sparrow swallow eagle falcon pelican penguin ostrich flamingo turtle lizard crocodile alligator
dolphin whale shark salmon herring lobster mussel butterfly beetle mosquito spider scorpion millipede worm
happiness kindness courage freedom justice wisdom patience success address process progress necessary possible
committee mississippi tennessee accommodation bookkeeper balloon bassoon raccoon cocoon noodle doodle poodle
teacher student doctor farmer butcher baker plumber sailor soldier painter singer dancer writer runner swimmer
yellow purple silver golden crimson scarlet little bitter clever gentle honest lovely narrow simple wooden
banner dinner winner sinner hollow follow borrow sorrow tomorrow narrative element excellent tree bee sea egg
cat dog hat sun moon star fish bird milk bread water sugar salt soup cake nut
""".split()  # noqa: SIM905

CITIES = [
    "Paris", "Berlin", "Rome", "Madrid", "Lisbon", "London", "Dublin", "Oslo", "Vienna", "Athens", "Moscow",
    "Beijing", "Tokyo", "Seoul", "Bangkok", "Hanoi", "Cairo", "Nairobi", "Ottawa", "Havana", "Lima", "Prague",
    "Milan", "Munich", "Boston", "Chicago", "Sydney", "Mumbai", "Shanghai", "Geneva",
]  # fmt: skip
SKIES = ["sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear", "stormy"]
STATES = ["shipped", "delivered", "paid", "cancelled", "waiting", "packed", "returned", "lost"]
